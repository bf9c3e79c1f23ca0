"""Adapting some experts, sharing factors among them, and selecting experts by their use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from router_runs import Run, new_base, samples, shake
from safetensors.torch import load_file
from small_run import Train, manifest_of
from tolerances import step_with_noise
from torch import Tensor

from finetune.adapters.attach import attach_adapter
from finetune.adapters.audit import audit_gradients
from finetune.adapters.lora import Adapter
from finetune.adapters.provenance import BaseRecord
from finetune.adapters.read_back import read_back
from finetune.adapters.sites import describe_sites
from finetune.adapters.store import WEIGHTS, adapter_tensors, read_adapter_into, write_adapter
from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.expert_selection import SelectRule, read_expert_scores, write_expert_scores
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, DataConfig, ExpertAdapterConfig
from finetune.data.batches import collate
from finetune.errors import ConfigError, InputError
from finetune.evaluate.expert_scores import check_selection, choose, refuse_too_many, score_experts
from finetune.evaluate.opening import open_model
from finetune.model.build import Base
from finetune.model.forward import logits, record_router
from finetune.model.noise import rounding_noise

Chosen = dict[int, tuple[int, ...]]
SELECTION: Chosen = {0: (1, 4), 1: (0, 2, 7)}
EXPERTS = AdapterConfig(attention=AttentionAdapterConfig(rank=0), experts=ExpertAdapterConfig(rank=3, alpha=5.0))
DATA = DataConfig(train={}, max_length=256)


def sharing(share: str) -> AdapterConfig:
    return replace(EXPERTS, experts=replace(EXPERTS.experts, share=share))


def trained(
    directory: Path, config: AdapterConfig, selection: dict[int, tuple[int, ...]] | None
) -> tuple[Base, Adapter]:
    base = new_base(directory)
    adapter = attach_adapter(base, config, seed=0, selection=selection)
    shake(adapter.parameters(), 0.3)
    return base, adapter


def write(out: Path, base: Base, adapter: Adapter, config: AdapterConfig) -> Path:
    name = str(base.checkpoint.directory)
    write_adapter(out, adapter, config, BaseRecord(name, None, base.identity))
    return out


def by_expert(adapter: Adapter, layer: int) -> dict[str, Tensor]:
    """A layer's factors in PEFT's file, cut by PEFT's formula: B.reshape(out, r, E), A.reshape(E, r, in)."""
    path, tensors = f"base_model.model.model.layers.{layer}.mlp.experts", adapter_tensors(adapter)
    found = {}
    for name, key in (("gate_up", f"{path}.base_layer"), ("down", path)):
        a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        found |= {f"{name}_a": a.reshape(8, 3, -1), f"{name}_b": b.reshape(len(b), 3, 8).permute(2, 0, 1)}
    return found


@pytest.mark.parametrize("share", ["none", "a", "b"])
@pytest.mark.parametrize("selection", [None, SELECTION], ids=["all", "some"])
def test_the_live_model_equals_a_full_adapter_with_these_factors(
    share: str, selection: dict[int, tuple[int, ...]] | None, tiny_base: Path
) -> None:
    """Against a plain adapter on every expert, filled from the file: zeros for the others, shared factors repeated."""
    base, adapter = trained(tiny_base, sharing(share), selection)
    plain_base = new_base(tiny_base)
    plain = attach_adapter(plain_base, EXPERTS, seed=9)
    with torch.no_grad():
        for layer in (0, 1):
            for name, factor in by_expert(adapter, layer).items():
                plain.parameters()[f"model.layers.{layer}.mlp.experts.{name}"].copy_(factor)
        ids = torch.from_numpy(samples(1)[0].ids).long()
        limit = rounding_noise(base.model, lambda: logits(base.model, ids))
        assert (logits(base.model, ids) - logits(plain_base.model, ids)).abs().max() <= limit
        assert limit < 1e-2
        with adapter.disabled():
            assert (logits(base.model, ids) - logits(plain_base.model, ids)).abs().max() > 1e-2
    for layer in (0, 1):
        chosen = list(range(8)) if selection is None else list(selection[layer])
        factors = by_expert(adapter, layer)
        others = [expert for expert in range(8) if expert not in chosen]
        assert all(not factor[others].count_nonzero() for factor in factors.values())
        for name, factor in factors.items():
            same = all(torch.equal(factor[chosen[0]], factor[expert]) for expert in chosen)
            assert same == (share != "none" and name.endswith(f"_{share}"))


def test_only_the_chosen_experts_have_parameters_gradients_and_optimiser_state(tiny_base: Path) -> None:
    run = Run(tiny_base, adapter=EXPERTS, fresh=True)
    chosen = Run(tiny_base, adapter=EXPERTS, fresh=True, selection=SELECTION)
    batches = [collate([samples(6)])]
    for each in (run, chosen):
        each(batches)
        each(batches)
    shape = chosen.base.checkpoint.arch
    per_expert = 3 * (2 * shape.hidden + 3 * shape.expert_width)
    state, whole = (
        sum(t.numel() for name, t in each.step.engine.optimizer_tensors().items() if not name.endswith("/step"))
        for each in (chosen, run)
    )
    assert state == 2 * per_expert * 5 == 2 * sum(site.num_parameters for site in chosen.adapter.sites)
    assert state < whole / 3
    for layer, experts in SELECTION.items():
        written, full = by_expert(chosen.adapter, layer), by_expert(run.adapter, layer)
        for name, factor in written.items():
            others = [expert for expert in range(8) if expert not in experts]
            assert torch.equal(factor[others], torch.zeros_like(factor[others])), "exactly zero after two updates"
            assert factor[list(experts)].count_nonzero()
            assert full[name][others].count_nonzero(), "where all are adapted these have moved"
    assert "2 to 3 of 8 experts" in describe_sites(list(chosen.adapter.sites), shape)


def test_the_first_gradient_of_a_chosen_expert_is_that_of_an_adapter_on_all(tiny_base: Path) -> None:
    """Of B; and shared factors get the sum over experts."""
    batches = [collate([samples(6)])]
    runs = {
        name: Run(tiny_base, adapter=config, fresh=True, selection=selection)
        for name, config, selection in (
            ("all", EXPERTS, None), ("some", EXPERTS, SELECTION), ("shared", sharing("b"), SELECTION)
        )
    }  # fmt: skip
    _, noise = step_with_noise(runs["all"], batches)
    runs["some"](batches)
    runs["shared"](batches)
    for layer, experts in SELECTION.items():
        name = f"model.layers.{layer}.mlp.experts.down_b"
        wanted = runs["all"].gradients[name][list(experts)]
        assert wanted.abs().max() > 0
        limit = noise.gradients * runs["all"].gradients[name].abs().max()
        assert (runs["some"].gradients[name] - wanted).abs().max() <= limit < 1e-3 * wanted.abs().max()
        assert (runs["shared"].gradients[name][0] - wanted.sum(0)).abs().max() <= len(experts) * limit
        assert (wanted[0] - wanted[1]).abs().max() > 0.1 * wanted.abs().max(), "another expert's gradient would show"


@pytest.mark.parametrize("share", ["none", pytest.param("a", marks=pytest.mark.slow), "b"])
def test_stock_peft_reads_it_back_and_training_continues_from_it(share: str, tiny_base: Path, tmp_path: Path) -> None:
    config = sharing(share)
    base, adapter = trained(tiny_base, config, SELECTION)
    directory = write(tmp_path / "adapter", base, adapter, config)
    if share != "b":
        result = read_back(base, adapter, directory, [samples(1)[0]])
        assert result.max_difference <= result.limit
        assert result.limit < 1e-2 < result.effect
    again = attach_adapter(new_base(tiny_base), config, seed=7, selection=SELECTION)
    read_adapter_into(directory, again, config, base.identity)
    assert all(torch.equal(again.parameters()[name], p) for name, p in adapter.parameters().items())
    fewer = attach_adapter(new_base(tiny_base), config, seed=7, selection={0: (1,), 1: (0, 2, 7)})
    with pytest.raises(InputError, match="updates expert 4, which the recipe does not adapt"):
        read_adapter_into(directory, fewer, config, base.identity)
    if share == "none":
        shared = attach_adapter(new_base(tiny_base), sharing("a"), seed=7, selection=SELECTION)
        with pytest.raises(InputError, match="differs among experts"):
            read_adapter_into(directory, shared, config, base.identity)


@pytest.mark.parametrize("share", ["none", "a", "b"])
def test_the_audit_counts_the_chosen(share: str, tiny_base: Path) -> None:
    base, adapter = trained(tiny_base, sharing(share), SELECTION)
    ids = torch.from_numpy(samples(8)[-1].ids).long()
    logits(base.model, ids).logsumexp(-1).sum().backward()
    for factor in "ab":
        result = audit_gradients(base.model, adapter, factor)
        assert result.experts_adapted == (() if factor == share else (2, 3))
        assert result.experts_adapted == () or "2 layers, 2 to 3 of 2 to 3 reached" in result.describe()


class TestScore:
    def oracle(self, base: Base, used: list[object]) -> tuple[np.ndarray, np.ndarray]:
        """ESFT's two scores, example by example and token by token, each example alone in the model."""
        gate, share = np.zeros((len(used), 2, 8)), np.zeros((len(used), 2, 8))
        for number, sample in enumerate(used):
            with torch.no_grad(), record_router(base.model) as tape:
                logits(base.model, torch.from_numpy(sample.ids).long())
            for layer, routing in enumerate(tape.layers):
                for ids, x in zip(routing.expert_ids.tolist(), routing.logits.double().numpy(), strict=True):
                    top = np.exp(x[ids]) / np.exp(x[ids]).sum()
                    for expert, weight in zip(ids, top, strict=True):
                        gate[number, layer, expert] += weight / len(sample.ids)
                        share[number, layer, expert] += 1 / (len(sample.ids) * len(ids))
        return gate.mean(0), share.mean(0)

    def test_both_scores_equal_a_brute_force_count(self, tiny_base: Path) -> None:
        base, data = new_base(tiny_base), samples(7)
        affinity = score_experts(base, "tiny", data, DATA, "top_k=2", "gate", 5)
        used = [data[number * 7 // 5] for number in range(5)]
        gate, share = self.oracle(base, used)
        assert np.abs(np.array(affinity.gate) - gate).max() < 1e-6
        assert np.abs(np.array(affinity.tokens_share) - share).max() < 1e-9
        assert np.array(affinity.gate).sum(1) == pytest.approx([1, 1])
        assert np.abs(gate - share).max() > 1e-3, "the two scores differ, so neither stands for the other"
        wanted = {layer: tuple(sorted(np.argsort(-row)[:2].tolist())) for layer, row in enumerate(gate)}
        assert affinity.selected == wanted

    def test_top_p_is_the_smallest_set_with_that_share(self) -> None:
        scores = np.array([[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
        rule = lambda p: SelectRule("top_p", top_p=p)  # noqa: E731
        assert choose(scores, rule(0.4)) == {0: (0,), 1: (0, 1)}
        assert choose(scores, rule(0.7)) == {0: (0, 2), 1: (0, 1, 2)}
        assert choose(scores, rule(1.0)) == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
        assert choose(scores, SelectRule("top_k", top_k=1)) == {0: (0,), 1: (0,)}
        with pytest.raises(ConfigError, match="asks for 5 experts per layer, the base has 4"):
            refuse_too_many(SelectRule("top_k", top_k=5), 4)

    def test_a_score_file_round_trips_and_is_bound_to_its_base(self, tiny_base: Path, tmp_path: Path) -> None:
        base = new_base(tiny_base)
        affinity = score_experts(base, "tiny", samples(4), DATA, "top_p=0.5", "tokens", 4)
        write_expert_scores(tmp_path / "a.json", affinity)
        assert read_expert_scores(tmp_path / "a.json") == affinity
        check_selection(affinity, base, EXPERTS, "a.json")
        for broken, words in (
            (replace(affinity, base_identity="0" * 64), "was measured on another base"),
            (replace(affinity, selected={0: (1,), 1: ()}), "leaves layer 1 without an expert"),
            (replace(affinity, selected={0: (1,)}), "leaves layer 1 without an expert"),
            (replace(affinity, selected={0: (1, 1), 1: (2,)}), "names experts"),
            (replace(affinity, selected={0: (1, 8), 1: (2,)}), "names experts"),
        ):
            with pytest.raises(ConfigError, match=words):
                check_selection(broken, base, EXPERTS, "a.json")
        only_first = replace(EXPERTS, layers=(0, 0))
        check_selection(replace(affinity, selected={0: (1,)}), base, only_first, "a.json")
        with pytest.raises(ConfigError, match=r"did you mean a\.json"):
            read_expert_scores(tmp_path / "b.json")
        (tmp_path / "c.json").write_text("[1]")
        with pytest.raises(InputError, match=r"is not a file that|not an object"):
            read_expert_scores(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.experts.select=top_p=0", "above 0 and at most 1"),
        ("adapter.experts.select=top_p=1.2", "above 0 and at most 1"),
        ("adapter.experts.select=top_k=0", "whole number of experts"),
        ("adapter.experts.select=top_k=2.5", "whole number of experts"),
        ("adapter.experts.select=topk=2", "did you mean top_k"),
        ("adapter.experts.select=al", "did you mean all"),
        ("adapter.experts.share=c", "one of none, a, b"),
        ("adapter.router.mode=ful", "did you mean full"),
        ("trainer.router_balance_scope=steps", "did you mean step"),
        ("trainer.router_z_loss_coefficient=-1", "0 or more"),
        ("trainer.router_balance_coefficient=0.9", "the published config.json says 0.9"),
        ("evaluate.max_routing_drift=1.5", "above 0 and at most 1"),
    ],
)
def test_bad_settings_are_refused_at_once(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose("quickstart", [override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.experts.rank=0", "adapter.experts.select=top_k=2"], "adapter.experts.rank is 0"),
        (["trainer.router_balance_coefficient=0", "trainer.router_balance_scope=step"], "coefficient is 0"),
        (["adapter.router.mode=lora", "adapter.router.rank=0"], "must be at least 1"),
        (["evaluate.routing_examples=0", "evaluate.max_routing_drift=0.2"], "routing_examples is 0"),
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose("quickstart", overrides)


def test_a_run_scores_trains_resumes_and_exports_the_chosen(
    train: Train, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands: score to a file, train with it, leave the compact form, import that, and merge."""
    recipe, scores = str(workplace / "small.yaml"), tmp_path / "scores.json"
    assert main(["experts", "score", recipe, "--select", "top_k=3", "--examples", "6", "--out", str(scores)]) == 0
    assert "6 of 16 experts by gate with top_k=3, on 6 examples" in capsys.readouterr().out
    code, run = train(f"adapter.experts.select={scores}", "adapter.experts.share=a", "trainer.max_steps=2")
    assert code == 0
    printed = capsys.readouterr().err
    assert "2 layers x 3 of 8 experts" in printed and "one A for all" in printed
    selected = json.loads(scores.read_text())["selected"]
    tensors = load_file(run / "adapter" / WEIGHTS)
    b = tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"]
    moved = b.reshape(len(b), 4, 8).permute(2, 0, 1).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert moved == selected["1"]
    assert json.loads((run / "experts.json").read_text())["selected"] == selected
    small = sum(path.stat().st_size for path in (run / "adapter_compact").iterdir())
    assert small < 0.5 * (run / "adapter" / WEIGHTS).stat().st_size
    assert main(["adapter", "import", str(run / "adapter_compact"), "--out", str(tmp_path / "imported")]) == 0
    imported = load_file(tmp_path / "imported" / WEIGHTS)
    assert imported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(imported[key], tensor, rtol=0, atol=0)
    assert main(["adapter", "show", str(run)]) == 0
    assert "10 of 16 experts have none" in capsys.readouterr().out
    assert main(["export", str(run), "--to", "sglang", "--out", str(tmp_path / "sglang")]) == 0
    assert manifest_of(run)["status"] == "finished"
    opened = open_model(run).adapter.parameters()["model.layers.1.mlp.experts.down_b"]
    torch.testing.assert_close(opened, b.reshape(len(b), 4, 8).permute(2, 0, 1), rtol=0, atol=0)


def test_a_dry_run_counts_the_known_sites(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(workplace / "small.yaml")
    assert main(["train", recipe, "--dry-run", "adapter.experts.select=top_k=3", "adapter.router.mode=full"]) == 0
    out = capsys.readouterr().out
    assert "if the training data selects the experts (top_k=3)" in out and "2 layers x 3 of 8 experts" in out
    assert "only merged exports (bf16, mxfp4, gguf) contain it" in out and "SGLang" in out
    (tmp_path / "scores.json").write_text("{}")
    missing = f"adapter.experts.select={tmp_path / 'score.json'}"
    assert main(["train", recipe, "--dry-run", missing]) == 2
    assert "did you mean scores.json?" in capsys.readouterr().err


def test_a_resumed_run_adapts_the_experts_it_started_with(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from small_run import signal_after

    signal_after(monkeypatch, 2, signal.SIGTERM)
    code, run = train("adapter.experts.select=top_p=0.5", "trainer.max_steps=4")
    assert code == 143
    first = (run / "experts.json").read_text()
    monkeypatch.undo()
    monkeypatch.setattr("finetune.evaluate.expert_scores.score_experts", None)  # it must not be measured again
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "experts.json").read_text() == first

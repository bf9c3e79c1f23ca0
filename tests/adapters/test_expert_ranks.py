"""Expert ranks distributed by use: the budget, the function that files describe, and the commands."""

from __future__ import annotations

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_runs import Run, new_base, samples, shake
from safetensors.torch import load_file
from small_run import Train, signal_after
from test_expert_selection import DATA, SELECTION, write

from finetune.adapters.attach import attach_adapter
from finetune.adapters.audit import audit_gradients
from finetune.adapters.lora import Adapter, update_norms
from finetune.adapters.read_back import read_back
from finetune.adapters.sites import ExpertRanks, describe_sites, ranks_by_use
from finetune.adapters.store import WEIGHTS, read_adapter_into
from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.expert_selection import read_expert_scores, write_expert_scores
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig
from finetune.data.batches import collate
from finetune.errors import ConfigError, InputError
from finetune.evaluate.expert_scores import choose_experts, score_experts
from finetune.evaluate.opening import open_model
from finetune.model.build import Base
from finetune.model.forward import logits
from finetune.model.noise import rounding_noise

EXPERTS = ExpertAdapterConfig(rank=3, alpha=5.0, rank_by="gate", max_rank=9)
CONFIG = AdapterConfig(attention=AttentionAdapterConfig(rank=0), experts=EXPERTS)
RANKS: ExpertRanks = {
    0: {0: 2, 1: 9, 2: 0, 3: 1, 4: 3, 5: 0, 6: 4, 7: 5},
    1: {0: 5, 1: 0, 2: 1, 3: 1, 4: 0, 5: 7, 6: 2, 7: 8},
}
ROOT = AdapterConfig(attention=AttentionAdapterConfig(rank=2), experts=EXPERTS, rslora=True)


def trained(directory: Path, config: AdapterConfig = CONFIG, size: float = 0.3) -> tuple[Base, Adapter]:
    base = new_base(directory)
    adapter = attach_adapter(base, config, seed=0, selection=None, ranks=RANKS)
    shake(adapter.parameters(), size)
    return base, adapter


class TestBudget:
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 6), st.integers(1, 4))
    @settings(max_examples=60, deadline=None)
    def test_the_rank_budget_is_spent_exactly_and_monotonically(self, use: list[float], mean: int, times: int) -> None:
        highest = mean * times
        ranks = ranks_by_use(use, mean * len(use), highest)
        assert sum(ranks) == mean * len(use) and 0 <= min(ranks) <= max(ranks) <= highest
        assert all(a >= b for (a, u), (b, v) in itertools.permutations(zip(ranks, use, strict=True), 2) if u > v)
        assert ranks == ranks_by_use([value / 4 for value in use], mean * len(use), highest), "shares, not sizes, count"

    @given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(2, 9))
    @settings(max_examples=60, deadline=None)
    def test_ranks_are_the_nearest_to_the_shares(self, use: list[int], total: int) -> None:
        """Definition of the largest remainder: of all whole numbers with this sum the nearest to the exact shares."""
        quota = [total * value / sum(use) for value in use]
        distance = lambda ranks: sum(abs(r - q) for r, q in zip(ranks, quota, strict=True))  # noqa: E731
        every = (r for r in itertools.product(range(total + 1), repeat=len(use)) if sum(r) == total)
        assert distance(ranks_by_use(use, total, total)) == pytest.approx(min(map(distance, every)))

    def test_excess_over_the_highest_rank_goes_to_other_experts(self) -> None:
        assert ranks_by_use([0.97, 0.02, 0.01, 0.0], 16, 8) == [8, 5, 3, 0]
        assert ranks_by_use([1.0, 0.0, 0.0, 0.0], 16, 8) == [8, 3, 3, 2], "where nothing else is used, evenly"
        assert ranks_by_use([0.25] * 4, 6, 8) == [2, 2, 1, 1], "of equals the first"
        assert ranks_by_use([0.3, 0.7], 8, 4) == [4, 4]
        with pytest.raises(ValueError, match="do not go into"):
            ranks_by_use([0.3, 0.7], 9, 4)


@pytest.mark.parametrize("config", [CONFIG, ROOT], ids=["alpha / rank", "rsLoRA"])
def test_the_live_model_has_each_experts_own_rank_and_scale(config: AdapterConfig, tiny_base: Path) -> None:
    """Against an adapter of rank 9 on every expert that has each expert's scale · B A, computed here."""
    base, adapter = trained(tiny_base, config)
    plain_base = new_base(tiny_base)
    one_rank = replace(config, experts=ExpertAdapterConfig(rank=9, alpha=9.0 if not config.rslora else 3.0))
    plain = attach_adapter(plain_base, one_rank, seed=9)
    with torch.no_grad():
        for name, parameter in plain.parameters().items():
            if ".mlp.experts." not in name:
                parameter.copy_(adapter.parameters()[name])
                continue
            ours, start = adapter.parameters()[name], 0
            parameter.zero_()
            for expert, rank in RANKS[int(name.split(".")[2])].items():
                rows = ours[start : (start := start + rank)]
                scale = 5.0 / rank**0.5 if config.rslora and rank else 5.0 / max(rank, 1)
                if name.endswith("_a"):
                    parameter[expert, :rank] = rows * scale
                else:
                    parameter[expert, :, :rank] = rows.T
            assert start == len(ours) == 24
        ids = torch.from_numpy(samples(1)[0].ids).long()
        limit = rounding_noise(base.model, lambda: logits(base.model, ids))
        assert (logits(base.model, ids) - logits(plain_base.model, ids)).abs().max() <= limit
        for name, norm in update_norms(plain).items():
            assert update_norms(adapter)[name] == pytest.approx(norm, rel=1e-5)
        adapter.parameters()["model.layers.1.mlp.experts.down_b"][4:6] *= 1.5
        assert (logits(base.model, ids) - logits(plain_base.model, ids)).abs().max() > 10 * limit, "control"


def test_parameters_gradients_and_states_are_those_of_the_budget(tiny_base: Path) -> None:
    base, adapter = trained(tiny_base)
    uniform = attach_adapter(new_base(tiny_base), replace(CONFIG, experts=ExpertAdapterConfig(rank=3)), seed=0)
    counted = [sum(p.numel() for p in one.parameters().values()) for one in (adapter, uniform)]
    assert counted[0] == counted[1] == sum(site.num_parameters for site in adapter.sites)
    assert "rank 1 to 9 by use (48 ranks together)" in describe_sites(list(adapter.sites), base.checkpoint.arch)
    ids = torch.from_numpy(samples(8)[-1].ids).long()
    logits(base.model, ids).logsumexp(-1).sum().backward()
    for factor in "ab":
        assert audit_gradients(base.model, adapter, factor).experts_adapted == (6, 6)
    run = Run(tiny_base, adapter=CONFIG, fresh=True, ranks=RANKS)
    for _ in range(2):
        run([collate([samples(6)])])
    states = run.step.engine.optimizer_tensors().items()
    assert sum(t.numel() for name, t in states if not name.endswith("/step")) == 2 * counted[0]
    assert all(run.gradients[name].count_nonzero() for name in run.adapter.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stock_peft_reads_what_was_trained(dtype: str, tiny_base: Path, tmp_path: Path) -> None:
    config = replace(ROOT if dtype == "float32" else CONFIG, dtype=dtype)
    base, adapter = trained(tiny_base, config, size=0.1)
    directory = write(tmp_path / "adapter", base, adapter, config)
    if dtype == "float32":
        result = read_back(base, adapter, directory, [samples(1)[0]])
        assert result.max_difference <= result.limit
        assert result.limit < 1e-2 < result.effect
    again = attach_adapter(new_base(tiny_base), config, seed=7, ranks=RANKS)
    read_adapter_into(directory, again, config, base.identity)
    exact = 0.0 if dtype == "bfloat16" else 1e-6
    for name, parameter in adapter.parameters().items():
        torch.testing.assert_close(again.parameters()[name], parameter, rtol=exact, atol=0)
    lower = {layer: ranks | {7: ranks[7] - 1, 5: ranks[5] + 1} for layer, ranks in RANKS.items()}
    other = attach_adapter(new_base(tiny_base), config, seed=7, ranks=lower)
    with pytest.raises(InputError, match="goes beyond the ranks"):
        read_adapter_into(directory, other, config, base.identity)
    with pytest.raises(InputError, match="r is 9" if dtype == "bfloat16" else "rank_pattern is"):
        uniform = replace(config, experts=ExpertAdapterConfig(rank=3, alpha=5.0))
        read_adapter_into(directory, attach_adapter(new_base(tiny_base), uniform, seed=7), uniform, base.identity)


class TestChoice:
    def choose(self, base: Base, **experts: object) -> dict[int, tuple[int, ...]]:
        config = replace(CONFIG, experts=replace(EXPERTS, **experts))  # type: ignore[arg-type]
        affinity = choose_experts(base, "tiny", samples(7), DATA, config)
        assert affinity is not None and affinity.ranks is not None
        assert affinity.ranks.keys() == affinity.selected.keys() == {0, 1}
        for layer, ranks in affinity.ranks.items():
            assert len(ranks) == len(affinity.selected[layer]) and sum(ranks) == config.experts.rank * len(ranks)
        return affinity.ranks

    def test_from_a_measurement_or_its_file(self, tiny_base: Path, tmp_path: Path) -> None:
        base, file = new_base(tiny_base), tmp_path / "scores.json"
        measured = score_experts(base, "tiny", samples(7), DATA, "top_k=3", "tokens", 128)
        write_expert_scores(file, measured)
        by_gate, by_tokens = self.choose(base), self.choose(base, rank_by="tokens")
        assert by_gate[0] == tuple(ranks_by_use(measured.gate[0], 24, 9)) and by_gate != by_tokens
        assert self.choose(base, rank_by=str(file)) == by_tokens, "the score that the file was made by"
        chosen = self.choose(base, rank_by=str(file), select=str(file), max_rank=None)
        use = [measured.tokens_share[1][expert] for expert in measured.selected[1]]
        assert chosen[1] == tuple(ranks_by_use(use, 9, 12)) and len(chosen[1]) == 3
        assert self.choose(base, select="top_k=2", rank=1, max_rank=2)[0] in ((1, 1), (2, 0), (0, 2))

    def test_ranks_of_a_run_are_reused_unchanged_or_refused(self, tiny_base: Path, tmp_path: Path) -> None:
        base, file = new_base(tiny_base), tmp_path / "experts.json"
        measured = score_experts(base, "tiny", samples(7), DATA, "all", "gate", 128)
        ranks = {layer: tuple(of_layer.values()) for layer, of_layer in RANKS.items()}
        write_expert_scores(file, replace(measured, ranks=ranks))
        assert self.choose(base, rank_by=str(file)) == ranks
        for settings_, words in (
            ({"rank": 4, "max_rank": 9}, "has 24 ranks in layer 0, adapter.experts.rank=4 for 8 experts makes 32"),
            ({"max_rank": 8}, "has rank 9 in layer 0, the highest here is 8"),
            ({"select": "top_k=8", "rank": 3}, None),
            ({"select": "top_k=7"}, "ranks of other experts in layer 0"),
        ):
            if words is None:
                assert self.choose(base, rank_by=str(file), **settings_) == ranks
                continue
            with pytest.raises(ConfigError, match=words):
                self.choose(base, rank_by=str(file), **settings_)

    def test_a_file_that_does_not_fit_is_refused(self, tiny_base: Path, tmp_path: Path) -> None:
        base, file = new_base(tiny_base), tmp_path / "scores.json"
        measured = score_experts(base, "tiny", samples(3), DATA, "top_k=3", "gate", 128)
        write_expert_scores(file, replace(measured, base_identity="0" * 64))
        with pytest.raises(ConfigError, match=r"adapter.experts.rank_by: .* was measured on another base"):
            self.choose(base, rank_by=str(file))
        write_expert_scores(file, replace(measured, gate=[row[:-1] for row in measured.gate]))
        with pytest.raises(InputError, match="a score for each of the base's experts"):
            self.choose(base, rank_by=str(file))
        write_expert_scores(file, replace(measured, ranks={0: (1, 2), 1: (3, 3, 3)}))
        with pytest.raises(InputError, match="ranks are not one for each selected expert"):
            read_expert_scores(file)
        file.write_text(file.read_text().replace(f"{measured.gate[0][0]}", "NaN"))
        with pytest.raises(InputError, match="is not between 0 and 1"):
            read_expert_scores(file)
        with pytest.raises(ConfigError, match=r"adapter.experts.rank_by: there is no file .*\n.*did you mean scores"):
            self.choose(base, rank_by=str(tmp_path / "score.json"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rank_by=gates"], "did you mean gate"),
        (["rank_by=''"], "must be uniform, gate, tokens"),
        (["rank=0", "rank_by=gate"], "rank_by .*is set, but adapter.experts.rank is 0"),
        (["max_rank=8"], "max_rank .*rank_by is uniform"),
        (["rank_by=gate", "max_rank=3"], r"is 3, below adapter.experts.rank \(16\)"),
        (["rank_by=gate", "max_rank=0"], "at least 1"),
        (["rank_by=tokens", "share=a"], "a factor that experts share has one rank"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose("quickstart", [f"adapter.experts.{override}" for override in overrides])


def test_a_run_with_ranks_by_use_resumes_and_exports_readable_files(
    train: Train, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, scores = str(workplace / "small.yaml"), tmp_path / "scores.json"
    signal_after(monkeypatch, 2, signal.SIGTERM)
    code, run = train("adapter.experts.rank_by=gate", "adapter.experts.select=top_k=6", "trainer.max_steps=3")
    assert code == 143
    printed = capsys.readouterr().err
    assert "by use (48 ranks together)" in printed
    chosen = (run / "experts.json").read_text()
    ranks = json.loads(chosen)["ranks"]
    assert {sum(of_layer) for of_layer in ranks.values()} == {4 * 6} and ranks["0"] != ranks["1"]
    monkeypatch.undo()
    monkeypatch.setattr("finetune.evaluate.expert_scores.score_experts", None)  # it must not be measured again
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "experts.json").read_text() == chosen
    tensors = load_file(run / "adapter" / WEIGHTS)
    highest = max(rank for of_layer in ranks.values() for rank in of_layer)
    assert tensors["base_model.model.model.layers.0.mlp.experts.lora_A.weight"].shape[0] == 8 * highest
    capsys.readouterr()

    assert main(["adapter", "import", str(run / "adapter_compact"), "--out", str(tmp_path / "imported")]) == 0
    imported = load_file(tmp_path / "imported" / WEIGHTS)
    assert imported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(imported[key], tensor, rtol=1e-6, atol=0)
    assert main(["adapter", "show", str(run)]) == 0
    assert f"to {highest} in use, 48 together" in capsys.readouterr().out
    opened = open_model(run).adapter.parameters()["model.layers.1.mlp.experts.down_b"]
    assert opened.shape[0] == 8 and opened.shape[2] == highest

    monkeypatch.undo()
    again = [
        "adapter.experts.select=" + str(run / "experts.json"),
        "adapter.experts.rank_by=" + str(run / "experts.json"),
    ]
    code, _ = train(*again, f"adapter.init_from={run / 'adapter'}", "trainer.max_steps=1", "name=on")
    assert code == 0, "trained on from, with the ranks it has"
    assert "training starts from" in capsys.readouterr().err
    assert main(["experts", "score", recipe, "--examples", "6", "--out", str(scores)]) == 0
    assert f"adapter.experts.rank_by={scores}" in capsys.readouterr().out
    assert main(["train", recipe, "--dry-run", f"adapter.experts.rank_by={scores}"]) == 0
    out = capsys.readouterr().out
    assert "by use (64 ranks together)" in out and "0 to 16 each; LoRA scale on an expert = alpha 8" in out


def test_ranks_and_selection_may_come_from_two_files(tiny_base: Path) -> None:
    """Only experts with a rank are adapted, and an expert's initial factors do not depend on the others."""
    few = {layer: {expert: RANKS[layer][expert] for expert in chosen} for layer, chosen in SELECTION.items()}
    one = attach_adapter(new_base(tiny_base), CONFIG, seed=0, selection=SELECTION, ranks=few)
    every = attach_adapter(new_base(tiny_base), CONFIG, seed=0, ranks=RANKS)
    assert [site.experts for site in one.sites] == [(1, 4), (0, 2, 7)]
    first = one.parameters()["model.layers.0.mlp.experts.down_a"]
    assert torch.equal(first[9:], every.parameters()["model.layers.0.mlp.experts.down_a"][12:15])

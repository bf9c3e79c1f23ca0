"""The estimate's parameter counts against the planned sites and the adapter that is built, setting by setting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from router_runs import new_base

from finetune.adapters.attach import attach_adapter
from finetune.adapters.sites import Selection, plan_sites, ranks_of
from finetune.config.compose import compose
from finetune.config.expert_selection import ExpertScores, write_expert_scores
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig, RouterAdapterConfig
from finetune.estimate import memory
from finetune.estimate.fit import flops_per_token
from finetune.estimate.inputs import find_base, step_profile

UNEVEN: Selection = {0: (1, 4), 1: (0, 2, 3, 6, 7)}
PLAIN = AdapterConfig(
    attention=AttentionAdapterConfig(rank=3, targets=("q_proj", "o_proj")), experts=ExpertAdapterConfig(rank=5)
)


def experts(**settings: object) -> AdapterConfig:
    return replace(PLAIN, experts=replace(PLAIN.experts, **settings))  # type: ignore[arg-type]


CASES: dict[str, tuple[AdapterConfig, Selection | None]] = {
    "all": (PLAIN, None),
    "one layer": (replace(PLAIN, layers=(1, 1)), None),
    "top_k": (experts(select="top_k=3"), dict.fromkeys((0, 1), (1, 4, 6))),
    "more than there are": (experts(select="top_k=99"), None),
    "a file": (experts(select="FILE"), UNEVEN),
    "a file, the second layer": (replace(experts(select="FILE"), layers=(1, 1)), UNEVEN),
    "share a": (experts(share="a"), None),
    "share b of a file": (experts(share="b", select="FILE"), UNEVEN),
    "ranks": (experts(rank_by="gate"), dict.fromkeys((0, 1), tuple(range(8)))),
    "ranks of a file's choice": (experts(rank_by="FILE", select="FILE", max_rank=7), UNEVEN),
    "router lora": (replace(PLAIN, router=RouterAdapterConfig(mode="lora", rank=2)), None),
    "router full": (replace(experts(select="FILE"), router=RouterAdapterConfig(mode="full")), UNEVEN),
    "router alone": (
        replace(experts(rank=0), attention=AttentionAdapterConfig(rank=0), router=RouterAdapterConfig(mode="full")),
        None,
    ),
}


@pytest.fixture
def affinity(tmp_path: Path) -> tuple[Path, ExpertScores]:
    scores = [[0.3, 0.25, 0.2, 0.1, 0.07, 0.05, 0.03, 0.0], [0.125] * 8]
    found = ExpertScores("tiny", "0" * 64, 1, 10, scores, scores, "gate", "top_k=2", dict(UNEVEN))
    write_expert_scores(tmp_path / "scores.json", found)
    return tmp_path / "scores.json", found


def with_file(config: AdapterConfig, file: Path) -> AdapterConfig:
    named = {key: str(file) for key in ("select", "rank_by") if getattr(config.experts, key) == "FILE"}
    return replace(config, experts=replace(config.experts, **named))


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_adapter(name: str, tiny_base: Path, affinity: tuple[Path, ExpertScores]) -> None:
    given, selection = CASES[name]
    config = with_file(given, affinity[0])
    base, info = new_base(tiny_base), find_base(str(tiny_base))
    assert info is not None
    ranks = None
    if config.experts.rank_by != "uniform":
        assert selection is not None
        ranks = ranks_of(affinity[1], "gate", selection, config.experts)
    sites = plan_sites(base.checkpoint.arch, config, selection, ranks)
    built = attach_adapter(base, config, seed=0, selection=selection, ranks=ranks).parameters()
    recipe = compose("quickstart", [f"model.path={tiny_base}"]).config
    step = step_profile(replace(recipe, adapter=config), info.arch, on_gpu=True)
    on_attention, on_experts = memory.lora_parameters(info.arch, step)
    of_kind = {
        kind: sum(site.num_parameters for site in sites if site.kind == kind)
        for kind in ("attention", "router", "experts")
    }
    assert (on_attention, on_experts) == (of_kind["attention"] + of_kind["router"], of_kind["experts"])
    assert on_attention + on_experts == sum(p.numel() for p in built.values())
    assert on_experts == sum(p.numel() for name, p in built.items() if ".mlp.experts." in name)
    sizes = {part.name: part.num_bytes for part in memory.adapter_parts(info.arch, step)}
    assert sizes[memory.LORA] == sum(p.numel() * p.element_size() for p in built.values())
    if ranks is not None:
        highest = max(site.rank for site in sites if site.kind == "experts")
        assert highest <= step.highest_rank and len({p.shape for n, p in built.items() if n.endswith("down_a")}) >= 1


def test_a_share_of_the_use_is_counted_as_all_at_most(tiny_base: Path) -> None:
    info = find_base(str(tiny_base))
    assert info is not None
    recipe = compose("quickstart", [f"model.path={tiny_base}"]).config
    counts = [
        memory.lora_parameters(info.arch, step_profile(replace(recipe, adapter=config), info.arch, on_gpu=True))[1]
        for config in (PLAIN, experts(select="top_p=0.2"))
    ]
    assert counts[0] == counts[1]


def test_experts_without_an_update_take_no_time(tiny_base: Path) -> None:
    """2 of 8 experts: a quarter of the LoRA products of the routed tokens, (2 D + 3 F) multiplications per rank."""
    info = find_base(str(tiny_base))
    assert info is not None
    base, recipe = info.arch, compose("quickstart", [f"model.path={tiny_base}"]).config

    def flops(config: AdapterConfig) -> float:
        return flops_per_token(base, step_profile(replace(recipe, adapter=config), base, on_gpu=True))

    none = flops(experts(rank=0))
    whole, some = flops(PLAIN) - none, flops(experts(select="top_k=2")) - none
    assert some == pytest.approx(whole / 4)
    passes = 3 + recipe.trainer.activation_checkpointing
    per_row = 2 * 5 * (2 * base.hidden + 3 * base.expert_width)
    assert whole == pytest.approx(passes * base.num_layers * base.num_active_experts * per_row)

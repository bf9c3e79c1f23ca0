"""The estimate: published sizes, known figures, changes that save what they claim, a plan, and exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import Train

from finetune.adapters.sites import plan_sites
from finetune.arch import Arch
from finetune.cli import main as cli
from finetune.cli import preflight as guard
from finetune.config.compose import compose
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig, RunConfig
from finetune.errors import CapacityError, is_out_of_memory
from finetune.estimate import memory
from finetune.estimate.advice import as_text, changes_that_fit, cheapest_changes, make_plan, with_overrides
from finetune.estimate.fit import GIB, LENGTH_STEP, Budget, fit, flops_per_token, longest_sequences
from finetune.estimate.inputs import PUBLISHED, BaseInfo, find_base, step_profile
from finetune.estimate.memory import estimate_memory

CARD = Budget.of_card(80)
LARGE = ("adapter.experts.rank=16", "adapter.experts.alpha=32", "data.max_length=16384")


def published(name: str) -> BaseInfo:
    info = find_base(f"openai/gpt-oss-{name}")
    assert info is not None
    return info


def published_arch(name: str) -> Arch:
    root = Path(__file__).parents[2] / "data" / "tokenizer" / f"gpt-oss-{name}"
    return Arch.from_config(json.loads((root / "config.json").read_text()), "config.json")


@pytest.fixture(scope="module")
def recipe_120b() -> RunConfig:
    return compose("legal_120b").config


@pytest.fixture(scope="module")
def too_large() -> RunConfig:
    return compose("legal_120b", LARGE).config


@pytest.mark.parametrize("name", ["20b", "120b"])
def test_a_base_has_the_bytes_of_its_published_tensors(name: str) -> None:
    base, tensors = published(name).arch, published_arch(name).expected_tensors()
    assert base.num_bytes() == published_arch(name).num_bytes()
    step = step_profile(compose(f"legal_{name}").config, base, on_gpu=True)
    sizes_of = {part.name: part.num_bytes for part in memory.base_parts(base, step)}
    assert sum(sizes_of.values()) == base.num_bytes()
    experts = {n: s for n, s in tensors.items() if ".experts." in n}
    width = {"U8": 1, "BF16": 2}
    assert sizes_of[memory.PACKED_EXPERTS] == sum(width[dtype] * _count(shape) for dtype, shape in experts.values())


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(),
        AdapterConfig(attention=AttentionAdapterConfig(rank=0), layers=(3, 7)),
        AdapterConfig(attention=AttentionAdapterConfig(targets=("o_proj", "k_proj")), layers=(20, 23)),
        AdapterConfig(experts=ExpertAdapterConfig(rank=0)),
    ],
)
@pytest.mark.parametrize("name", ["20b", "120b"])
def test_parameters_are_those_of_the_planned_sites(name: str, adapter: AdapterConfig) -> None:
    config = replace(compose(f"legal_{name}").config, adapter=adapter)
    step = step_profile(config, published(name).arch, on_gpu=True)
    sites = plan_sites(published_arch(name), adapter)
    kinds = [sum(site.num_parameters for site in sites if site.kind == kind) for kind in ("attention", "experts")]
    assert list(memory.lora_parameters(published(name).arch, step)) == kinds


def test_known_figures_of_120b(recipe_120b: RunConfig) -> None:
    """Figures of the training kernels' arithmetic: bytes of the parts, FLOPs of a token, bytes of the LoRA state."""
    base = published("120b").arch
    step = step_profile(recipe_120b, base, on_gpu=True)
    sizes_of = {part.name: part.num_bytes / 1e9 for part in memory.base_parts(base, step)}
    biases = base.num_layers * base.num_experts * base.expert_biases * 2 / 1e9
    assert sizes_of[memory.PACKED_EXPERTS] - biases == pytest.approx(60.91, abs=0.01)
    assert sizes_of[memory.ATTENTION] == pytest.approx(1.94, abs=0.01)
    assert sizes_of[memory.HEAD] == pytest.approx(1.16, abs=0.01)
    state = replace(step, attention_rank=0, expert_rank=16, adapter_bytes=2, gradient_bytes=2, optimizer="adamw_8bit")
    small = sum(part.num_bytes for part in memory.adapter_parts(base, state)) + memory.gradients(base, state).num_bytes
    assert small / 1e9 == pytest.approx(6.4, abs=0.05)


@pytest.mark.parametrize(
    ("name", "recomputed", "kept", "at_4k"), [("20b", 20.5, 14.4, 790 / 35.4), ("120b", 29.6, 20.5, 790 / 24.4)]
)
def test_flops_of_a_token(name: str, recomputed: float, kept: float, at_4k: float) -> None:
    base = published(name).arch
    step = step_profile(compose(f"legal_{name}").config, base, on_gpu=True)
    step = replace(step, attention_rank=0, expert_rank=0, longest_example=1)
    assert flops_per_token(base, step) / 1e9 == pytest.approx(recomputed, rel=0.005)
    assert flops_per_token(base, replace(step, checkpointing=False)) / 1e9 == pytest.approx(kept, rel=0.005)
    assert flops_per_token(base, replace(step, longest_example=4096)) / 1e9 == pytest.approx(at_4k, rel=0.01)


def test_both_figures_of_an_80_gb_card_are_named() -> None:
    assert CARD.num_bytes == 84.0e9
    assert "84.0e9 bytes = 78.2 GiB" in CARD.label


def test_the_longest_sequences_fit_and_longer_ones_do_not(recipe_120b: RunConfig) -> None:
    info = published("120b")
    step = step_profile(recipe_120b, info.arch, on_gpu=True)
    longest = longest_sequences(step, info.arch, CARD)
    assert 4096 < longest < info.arch.max_positions

    def peak(length: int) -> float:
        return estimate_memory(info.arch, replace(step, sequence_tokens=length, longest_example=length)).total_bytes

    assert peak(longest) <= CARD.num_bytes < peak(longest + LENGTH_STEP)


def test_savings_are_those_of_the_printed_overrides(too_large: RunConfig) -> None:
    base = published("120b").arch
    before = fit(too_large, base, CARD)
    assert not before.fits
    changes = cheapest_changes(too_large, base, CARD)
    assert len(changes) == 3
    for change in changes:
        pasted = compose("legal_120b", [*LARGE, *as_text(change.overrides).split()]).config
        after = fit(pasted, base, CARD)
        assert change.saves_bytes == before.over_bytes - after.over_bytes > 0
        assert change.fits == after.fits


def test_changes_that_fit_are_enough_and_each_is_needed(too_large: RunConfig) -> None:
    base = published("120b").arch
    enough = changes_that_fit(too_large, base, CARD)
    assert enough
    changed = with_overrides(too_large, enough)
    assert changed is not None and fit(changed, base, CARD).fits
    for key in enough:
        fewer = with_overrides(too_large, {other: value for other, value in enough.items() if other != key})
        needless = fewer is not None and fit(fewer, base, CARD).fits
        # alpha goes with its rank, and the accumulation with the size of a micro-batch
        assert not needless or key.endswith(("alpha", "gradient_accumulation_steps")), key
    assert changes_that_fit(too_large, base, Budget.of_card(24)) is None


def test_overrides_that_the_rules_forbid_are_not_proposed(too_large: RunConfig) -> None:
    assert with_overrides(too_large, {"adapter.layers": (9, 3)}) is None
    assert with_overrides(too_large, {"trainer.no_such_key": 1}) is None
    assert with_overrides(too_large, {"model.expert_storage": "int3"}) is None
    assert with_overrides(too_large, {"data.max_length": 16384}) is None, "nothing would change"


def test_a_plan_fits_and_keeps_the_step() -> None:
    one_by_one = ("trainer.micro_batch_size=1", "trainer.gradient_accumulation_steps=4")
    config, base = compose("legal_20b", one_by_one).config, published("20b").arch
    plan = make_plan(config, base, Budget.of_card(24), gpus=1)
    assert plan is not None and fit(plan.config, base, Budget.of_card(24)).fits
    assert plan.config == compose("legal_20b", [*one_by_one, *as_text(plan.overrides).split()]).config
    large = make_plan(config, base, CARD, gpus=1)
    assert large is not None and large.config.trainer.micro_batch_size > config.trainer.micro_batch_size
    sequences = [c.trainer.micro_batch_size * c.trainer.gradient_accumulation_steps for c in (config, large.config)]
    assert sequences[0] == sequences[1]
    assert make_plan(config, base, Budget.of_card(8), gpus=1) is None


def test_the_shipped_recipes_fit_80_gb() -> None:
    for name in ("20b", "120b"):
        assert fit(compose(f"legal_{name}").config, published(name).arch, CARD).fits, name


def test_the_command_prints_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "legal_120b"]) == 0
    out = capsys.readouterr().out
    for words in (memory.PACKED_EXPERTS, "fits,", "longest sequences", "not measured", "download", "84.0e9 bytes"):
        assert words in out
    assert cli.main(["estimate", "legal_120b", "--gpu-gib", "24", "--json"]) == 4
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert not data["fits"] and data["enough"] is None and len(data["changes"]) == 3
    assert sum(data["parts"].values()) == pytest.approx(data["peak_bytes"], abs=len(data["parts"]))
    assert "does not fit" in captured.err


def test_an_unknown_base_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "legal_20b", "model.path=someone/gpt-oss-odd"]) == 3
    assert PUBLISHED[0] in capsys.readouterr().err
    assert cli.main(["estimate", "legal_20b", "--gpus", "0"]) == 2


def test_a_run_that_does_not_fit_ends_before_it_begins(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "device_budget", lambda _: Budget.of_host(2 * 10**8))
    monkeypatch.setattr("finetune.train.run.train", None)  # not reached: nothing is loaded, downloaded or read
    code, run = train("trainer.micro_batch_size=64")
    assert code == 4 and not run.exists()
    message = capsys.readouterr().err
    for words in ("does not fit", "loss-head chunk", "saves", "trainer.ignore_memory_estimate=true"):
        assert words in message


def test_ignoring_the_estimate_is_logged(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "device_budget", lambda _: Budget.of_host(2 * 10**8))
    recipe = str(workplace / "small.yaml")
    with pytest.raises(CapacityError):
        guard.check_memory(compose(recipe).config)
    guard.check_memory(compose(recipe, ["trainer.ignore_memory_estimate=true"]).config)
    assert "starting all the same (trainer.ignore_memory_estimate)" in capsys.readouterr().err
    guard.check_memory(compose(recipe, ["distributed=fsdp2"]).config)
    assert "has not been compared with a GPU" in capsys.readouterr().err
    monkeypatch.setattr(guard, "device_budget", lambda _: Budget.of_host(8 * GIB))
    guard.check_memory(compose(recipe).config)
    assert "fits, " in capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """Stands for torch's class of this name."""


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "NCCL error in: a.cpp:1, unhandled cuda error\nLast error: Cuda failure 2 'out of memory'",
    ],
)
def test_memory_errors_of_libraries_are_recognised(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text)) and not is_out_of_memory(RuntimeError("CUDA error: invalid argument"))


@pytest.mark.parametrize(
    "error", [OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")]
)
def test_memory_that_runs_out_is_explained(
    error: Exception, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("finetune.train.step.OptimiserStep.__call__", end)
    code, run = train("evaluate.test_examples=1", "trainer.micro_batch_size=64")
    assert code == 4 and str(error) in json.loads((run / "manifest.json").read_text())["stopped_by"]
    message = capsys.readouterr().err
    assert str(error) in message and "output head" in message
    assert "trainer.micro_batch_size=32 trainer.gradient_accumulation_steps=4" in message and "saves" in message
    assert "then it fits" not in message


def test_other_errors_are_passed_on(
    workplace: Path,
) -> None:
    with pytest.raises(ValueError), guard.explained_out_of_memory(compose(str(workplace / "small.yaml")).config):
        raise ValueError("odd")

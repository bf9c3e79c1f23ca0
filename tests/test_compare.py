"""The comparison of kinds of adapter: equal parameters are equal, only answers are shuffled, the control can fail."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from finetune.adapters.sites import plan_sites
from finetune.cli.main import main
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig
from finetune.model.checkpoint import Checkpoint
from finetune.model.shapes import ModelShape

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield


def published_shape(name: str) -> ModelShape:
    path = BENCH.parent / "data" / "tokenizer" / name / "config.json"
    return ModelShape.from_config(json.loads(path.read_text()), str(path))


@pytest.mark.parametrize("size", ["tiny", "gpt-oss-20b"])
def test_equal_parameters_are_equal(size: str, tiny_base: Path) -> None:
    from compare_plan import LARGE, TINY, variants

    shape = Checkpoint.open(tiny_base).shape if size == "tiny" else published_shape(size)
    setting = TINY if size == "tiny" else LARGE
    found = variants(setting, shape)

    def parameters(name: str) -> int:
        variant = found[name]
        config = AdapterConfig(
            attention=AttentionAdapterConfig(rank=variant.attention), experts=ExpertAdapterConfig(rank=variant.experts)
        )
        return sum(site.num_parameters for site in plan_sites(shape, config))

    reference = parameters(next(iter(found)))
    equal = [name for name in found if "equal parameters" in name]
    assert len(equal) == 3
    assert all(abs(parameters(name) / reference - 1) < 0.08 for name in equal)  # whole ranks: 20b's experts go by 11 M
    assert parameters(next(name for name in found if name.startswith("attention only, r="))) < 0.5 * reference


def test_every_planned_run_is_a_recipe_that_holds(tiny_base: Path, tmp_path: Path) -> None:
    """Through the command's own validation, one of each variant."""
    from compare_plan import TINY, plan
    from compare_rows import write_rows
    from compare_run import recipe

    rows = write_rows("legal", TINY.tasks["legal"], tmp_path / "rows", shuffled=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(TINY, str(tiny_base), rows, 1, tmp_path))
    planned = plan(TINY, Checkpoint.open(tiny_base).shape, [0])
    for words in {tuple(each.variant.overrides(TINY)) for each in planned}:
        assert main(["train", str(path), *words, "--dry-run"]) == 0
    assert main(["train", str(path), "adapter.router.mode=ful", "--dry-run"]) == 2


def test_only_answers_are_shuffled(tmp_path: Path) -> None:
    from compare_plan import Task
    from compare_rows import write_rows

    plain, shuffled = (write_rows("legal", Task(300, 50), tmp_path / str(s), shuffled=s) for s in (False, True))
    before, after = ([json.loads(line) for line in each.train.open()] for each in (plain, shuffled))
    assert plain.test.read_bytes() == shuffled.test.read_bytes() and plain.labels == shuffled.labels
    assert Counter(row["answer"] for row in before) == Counter(row["answer"] for row in after)
    assert [row["messages"][:-1] for row in before] == [row["messages"][:-1] for row in after]
    assert all(row["messages"][-1]["content"] == row["answer"] for row in after)
    kept = sum(one["answer"] == other["answer"] for one, other in zip(before, after, strict=True))
    assert kept < 60  # 300 x the chance that two drawn answers agree, about 0.06
    assert {row["contract"] for row in before}.isdisjoint(json.loads(line)["contract"] for line in plain.test.open())


def test_the_control_can_fail() -> None:
    from compare import beats_constant

    right = np.repeat([0, 1, 2, 3], 25)
    half = np.where(np.arange(100) % 2 == 0, right, (right + 1) % 4)
    assert beats_constant({"right": right.tolist(), "chosen": half.tolist()})
    assert not beats_constant({"right": right.tolist(), "chosen": [0] * 100})


def test_differences_are_paired_by_seed() -> None:
    from compare import differences

    def run(nats: float) -> dict[str, object]:
        return {"scores": {"nll": [nats, nats], "tokens": [1.0, 1.0]}}

    runs, reference = {0: run(1.0), 1: run(5.0), 2: run(9.0)}, {0: run(2.0), 1: run(5.5)}
    assert differences(runs, reference) == {"difference": "-0.750 [-1.000, -0.500]"}

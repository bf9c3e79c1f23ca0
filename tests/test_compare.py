"""The comparison of kinds of adapter: equal parameters are equal, rates by validation, the controls can fail."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune.adapters.sites import plan_sites
from finetune.arch import Arch
from finetune.cli.main import main
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig
from finetune.model.checkpoint import Checkpoint

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield


def published_shape(name: str) -> Arch:
    path = BENCH.parent / "data" / "tokenizer" / name / "config.json"
    return Arch.from_config(json.loads(path.read_text()), str(path))


@pytest.mark.parametrize("size", ["tiny", "gpt-oss-20b", "gpt-oss-120b"])
def test_equal_parameters_are_equal(size: str, tiny_base: Path) -> None:
    from compare import setting_for
    from compare_plan import LARGE_20B, LARGE_120B, TINY, variants

    shape = Checkpoint.open(tiny_base).arch if size == "tiny" else published_shape(size)
    setting = {"tiny": TINY, "gpt-oss-20b": LARGE_20B, "gpt-oss-120b": LARGE_120B}[size]
    assert setting_for(shape) is setting
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
    assert all(
        abs(parameters(name) / reference - 1) < 0.08 for name in equal
    )  # whole ranks: 20b's experts go by 11 M, 120b's by 66 M
    assert parameters(next(name for name in found if name.startswith("attention only, r="))) < 0.5 * reference


def test_every_planned_run_is_a_recipe_that_holds(tiny_base: Path, tmp_path: Path) -> None:
    """Through the command's own validation, one of each variant."""
    from compare_plan import TINY, plan
    from compare_rows import write_rows
    from compare_run import recipe

    rows = write_rows("legal", TINY.tasks["legal"], tmp_path / "rows")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(TINY, str(tiny_base), rows, TINY.tasks["legal"], tmp_path))
    lines = [line for tier in plan(TINY, Checkpoint.open(tiny_base).arch) for line in tier]
    for words in {tuple(line.variant.overrides(TINY)) for line in lines}:
        assert main(["train", str(path), *words, "--dry-run"]) == 0
    assert main(["train", str(path), "adapter.router.mode=ful", "--dry-run"]) == 2


def test_plans_for_published_models_are_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from compare_plan import LARGE_20B, LARGE_120B, plan
    from compare_rows import write_rows
    from compare_run import recipe

    for name, setting in (("gpt-oss-20b", LARGE_20B), ("gpt-oss-120b", LARGE_120B)):
        task = setting.tasks["creative"]
        path = tmp_path / f"{name}.yaml"
        rows = write_rows("creative", task, tmp_path / "rows")
        path.write_text(recipe(setting, f"openai/{name}", rows, task, tmp_path))
        lines = [line for tier in plan(setting, published_shape(name)) for line in tier]
        for words in {tuple(line.variant.overrides(setting)) for line in lines}:
            assert main(["config", "show", str(path), *words]) == 0
        chunk = [line.split() for line in capsys.readouterr().out.splitlines() if "experts_per_chunk" in line]
        assert chunk and all((words[1] == "8") == (setting is LARGE_120B) for words in chunk)


def test_every_control_that_knows_nothing_is_planned(tiny_base: Path) -> None:
    from compare_plan import LARGE_20B, TINY, plan

    tiny, large = (
        {(line.labels, line.base) for tier in plan(setting, shape) for line in tier if line.must_learn_nothing}
        for setting, shape in ((TINY, Checkpoint.open(tiny_base).arch), (LARGE_20B, published_shape("gpt-oss-20b")))
    )
    assert tiny == {("renamed and shuffled", "given"), ("shuffled", "constructed")}
    assert large == {("renamed and shuffled", "given")}, "there is no constructed 20b"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def test_only_answers_are_shuffled(tmp_path: Path) -> None:
    from compare_plan import Task
    from compare_rows import write_rows

    plain, shuffled = (write_rows("legal", Task(300, 40, 50), tmp_path, how) for how in ("as they are", "shuffled"))
    before, after = rows_of(plain.train), rows_of(shuffled.train)
    assert plain.test.read_bytes() == shuffled.test.read_bytes() and plain.labels == shuffled.labels
    assert plain.validation.read_bytes() == shuffled.validation.read_bytes()
    assert Counter(row["answer"] for row in before) == Counter(row["answer"] for row in after)
    assert [row["messages"][:-1] for row in before] == [row["messages"][:-1] for row in after]
    assert all(row["messages"][-1]["content"] == row["answer"] for row in after)
    kept = sum(one["answer"] == other["answer"] for one, other in zip(before, after, strict=True))
    assert kept < 60  # 300 x the chance that two drawn answers agree, about 0.06
    assert {row["contract"] for row in before}.isdisjoint(row["contract"] for row in rows_of(plain.test))


def test_renamed_labels_are_other_labels_and_the_same_in_every_split(tmp_path: Path) -> None:
    from compare_plan import Task
    from compare_rows import write_rows

    task = Task(600, 200, 300)
    plain, renamed = (write_rows("legal", task, tmp_path, how) for how in ("as they are", "renamed"))
    names: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for old, new in zip(rows_of(getattr(plain, split)), rows_of(getattr(renamed, split)), strict=True):
            names.setdefault(old["answer"], set()).add(new["answer"])
            assert old["messages"][:-1] == new["messages"][:-1] and new["messages"][-1]["content"] == new["answer"]
    assert all(len(new) == 1 and old not in new for old, new in names.items())
    assert len(names) == len(set.union(*names.values())) == 24 == len(plain.labels or ())


def test_rates_are_chosen_by_validation_at_the_end() -> None:
    from compare_plan import Line, Variant
    from compare_table import best_rate, rates_table

    tried = {
        1e-3: {"steps": 20, "validation": [(10, 0.2), (20, 0.9)]},
        2e-3: {"steps": 20, "validation": [(10, 0.8), (20, 0.7)]},
    }
    assert best_rate(tried) == 2e-3
    line = Line("legal", Variant("x", 1, 1))
    assert [row["taken"] for row in rates_table({line: tried}, 2)] == ["", "yes"]
    assert [row["taken"] for row in rates_table({line: tried}, 3)] == ["", ""], "one rate is still to be tried"


def test_the_control_can_fail() -> None:
    from compare_plan import Line, Run, Variant
    from compare_table import Finished, test_table

    right = np.repeat([0, 1, 2, 3], 25)
    half = np.where(np.arange(100) % 2 == 0, right, (right + 1) % 4)

    def table(labels: Any, base: Any, chosen: NDArray[np.int64]) -> list[dict[str, Any]]:
        scores = {"nll": [1.0] * 100, "tokens": [1.0] * 100, "right": right.tolist()}
        scores |= {"chosen": chosen.tolist(), "centred": chosen.tolist()}
        result = {"parameters": 1, "steps": 1, "clock": 1.0, "processor_seconds_per_step": 1.0}
        run = Run(Line("legal", Variant("x", 1, 1), labels, base), 0, 1e-3)
        return test_table([Finished(run, result, scores)], {("legal", "given", ""): scores}, False)

    for labels, base in (("renamed and shuffled", "given"), ("shuffled", "constructed")):
        assert table(labels, base, half)[-1]["control"] == "FAILED"
        assert table(labels, base, np.zeros(100, dtype=np.int64))[-1]["control"] == "passed"
    for labels in ("shuffled", "as they are"):
        assert "control" not in table(labels, "given", half)[-1], "knowledge of the base may show there"
        assert table(labels, "given", half)[-1]["beats constant"] == "yes"
    assert table("as they are", "given", np.zeros(100, dtype=np.int64))[-1]["beats constant"] == "no"


def test_differences_are_paired_by_seed() -> None:
    from compare_table import differences

    def scores(nats: float) -> dict[str, Any]:
        return {"nll": [nats, nats], "tokens": [1.0, 1.0]}

    runs, reference = {0: scores(1.0), 1: scores(5.0), 2: scores(9.0)}, {0: scores(2.0), 1: scores(5.5)}
    assert differences(runs, reference) == {"difference": "-0.750 [-1.000, -0.500]"}


def test_a_program_that_is_cut_short_finds_what_it_made(tmp_path: Path) -> None:
    """Nothing is made once time is up, and a run lies where the next start looks for it."""
    from compare_plan import TINY, Line, Run, Variant
    from compare_run import Runner

    runner = Runner(TINY, {"given": ("base", "digest")}, tmp_path, lambda: False)
    run, other = (Run(Line("legal", Variant("x", 1, 1)), 0, rate) for rate in (1e-3, 2e-3))
    assert runner.trained(run) is None and runner.scored(run) is None and not runner.directory(run).exists()
    runner.directory(run).mkdir(parents=True)
    (runner.directory(run) / "trained.json").write_text('{"steps": 3}')
    assert runner.trained(run) == {"steps": 3} and runner.trained(other) is None
    changed = Runner(TINY, {"given": ("base", "another digest")}, tmp_path, lambda: False)
    assert changed.trained(run) is None, "another base"

"""One value of a stored file replaced by anything: the answer is a message and a known exit code, never a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz_inputs import anything, must_answer

from finetune.adapters.store import AdapterFile
from finetune.arch import Arch
from finetune.config.expert_selection import ExpertScores, read_expert_scores
from finetune.config.paths import shipped_dir
from finetune.data.cache import SplitStats
from finetune.data.harmony.tokenizer import read_tokenizer
from finetune.evaluate.measure import ExampleScore, GeneratedAnswer, MeasurementLog
from finetune.manifest import read_manifest
from finetune.report.html import write_html
from finetune.report.markdown import write_report
from finetune.results import read_evaluation
from finetune.train.run_directory import Run

OLD = Path(__file__).parent / "fixtures" / "run_v0_1_0" / "finished"
SETTINGS = settings(
    deadline=None, max_examples=60, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
FIGURES = {"base": {"value": 2.0, "interval": [1.0, 3.0]}, "adapter": {"value": 1.0, "interval": None}}
EVALUATION = {
    "adapter": "adapter", "base": {"name": "b", "identity": "0"}, "confidence": 0.95, "notes": ["n"],
    "left_out": {"skipped": 1}, "contamination": None, "answers": None,
    "suites": [{"suite": "test", "rows": 4, "records": 4, "loss": FIGURES, "perplexity": FIGURES}],
}  # fmt: skip
SCORES = {"format": 1} | asdict(
    ExpertScores("b", "0", 1, 1, [[1.0]], [[1.0]], "gate", "top_p=0.2", {0: (0,)}, {0: (4,)})
)
TOKENIZER = {
    "model": {"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"], "a b"]},
    "added_tokens": [{"id": 2, "content": "<x>", "special": True}],
}
CONFIG = json.loads((shipped_dir("data") / "tokenizer" / "gpt-oss-20b" / "config.json").read_text())
ROWS = [
    {"belongs_to": {"a": 1}},
    {"measured": "score", "who": "base", "suite": "test", "row": 0} | asdict(ExampleScore(1.0, 2.0, [-1.0], None)),
    {"measured": "text", "who": "adapter", "suite": "test", "row": 1}
    | asdict(GeneratedAnswer(3, "q", None, "f", "", True, None)),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in JSON data."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from places(value[key])


def changed(content: Any, number: int, other: Any) -> Any:
    """A copy of JSON data with one value, chosen by a number, replaced."""
    whole = [copy.deepcopy(content)]
    found = list(places(whole))
    container, key = found[number % len(found)]
    container[key] = other
    return whole[0]


change = {
    "number": st.integers(0, 10_000),
    "other": anything | st.sampled_from([10**400, -1, 0, 1e308, [[]], {"a": []}]),
}


def read_all_of(run: Path) -> None:
    must_answer(lambda: read_manifest(run))
    must_answer(lambda: Run.open(run).check_unedited())
    must_answer(lambda: read_evaluation(run / "evaluation.json"))
    must_answer(lambda: write_report(run))
    must_answer(lambda: write_html(run))


@settings(SETTINGS, max_examples=25)
@given(name=st.sampled_from(["manifest.json", "evaluation.json", "sample.json"]), **change)
def test_files_of_a_run(tmp_path_factory: pytest.TempPathFactory, name: str, number: int, other: Any) -> None:
    run = tmp_path_factory.mktemp("run")
    for each in ("config.yaml", "manifest.json", "evaluation.json", "metrics.jsonl", "sample.json"):
        if (OLD / each).is_file():
            (run / each).write_bytes((OLD / each).read_bytes())
    source = (run / name).read_text() if (run / name).is_file() else json.dumps(EVALUATION)
    (run / name).write_text(json.dumps(changed(json.loads(source), number, other)))
    read_all_of(run)


@settings(SETTINGS, max_examples=25)
@given(**change)
def test_evaluations_of_today(tmp_path_factory: pytest.TempPathFactory, number: int, other: Any) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "evaluation.json").write_text(json.dumps(changed(EVALUATION, number, other)))
    must_answer(lambda: write_report(run))
    must_answer(lambda: write_html(run))


@SETTINGS
@given(line=st.integers(0, 2), **change)
def test_measurements(tmp_path_factory: pytest.TempPathFactory, line: int, number: int, other: Any) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [changed(each, number, other) if place == line else each for place, each in enumerate(ROWS)]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    must_answer(lambda: MeasurementLog(path, {"a": 1}))


@pytest.mark.parametrize(
    "name, content, read",
    [
        ("config.json", CONFIG, Arch.read),
        ("tokenizer.json", TOKENIZER, read_tokenizer),
        ("experts.json", SCORES, read_expert_scores),
        ("stats.json", asdict(SplitStats()), lambda path: SplitStats.from_json(json.loads(path.read_text()))),
        (
            "adapter_config.json",
            json.loads((OLD / "adapter" / "adapter_config.json").read_text()),
            lambda path: AdapterFile.open(path.parent),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files(tmp_path: Path, name: str, content: Any, read: Callable[[Path], object]) -> None:
    weights = OLD / "adapter" / "adapter_model.safetensors"
    (tmp_path / weights.name).write_bytes(weights.read_bytes())

    @SETTINGS
    @given(**change)
    def check(number: int, other: Any) -> None:
        (tmp_path / name).write_text(json.dumps(changed(content, number, other)))
        must_answer(lambda: read(tmp_path / name))

    check()

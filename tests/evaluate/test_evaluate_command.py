"""`finetune evaluate` on a finished run: its own figures again, resumed, paired, and what was seen in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from finetune.cli.main import main
from finetune.config.validate import load_run_config
from finetune.data.dataset import load_split
from finetune.evaluate import measure
from finetune.evaluate.likelihood import held_out_loss
from finetune.model.build import build_base
from finetune.model.checkpoint import Checkpoint
from finetune.records import parse_line

Summary = dict[str, object]


@pytest.fixture(scope="module")
def evaluated(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    arguments = ["evaluate", str(finished[0]), "--out", str(out), "--retention", "4", "--generate", "3"]
    assert main([*arguments, "--max-tokens", "4"]) == 0
    return out


def suites(out: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    return {suite["suite"]: suite for suite in json.loads((out / "summary.json").read_text())["suites"]}


def test_figures_equal_the_runs_own(finished: tuple[Path, str], evaluated: Path) -> None:
    own = json.loads((finished[0] / "evaluation.json").read_text())["suites"][0]
    test = suites(evaluated)["test"]
    assert test["rows"] == own["rows"] and test["accuracy"]["base"] == own["accuracy"]["base"]
    for who in ("base", "adapter"):
        assert test["loss"][who]["value"] == pytest.approx(own["loss"][who]["value"], abs=1e-5)
        assert test["accuracy"][who] == own["accuracy"][who]
        perplexity, loss = test["perplexity"][who], test["loss"][who]
        assert np.log([perplexity["value"], *perplexity["interval"]]) == pytest.approx(
            [loss["value"], *loss["interval"]]
        )
    difference = own["loss"]["adapter"]["value"] - own["loss"]["base"]["value"]
    assert test["loss"]["difference"]["value"] == pytest.approx(difference, abs=1e-5)


def test_before_figures_equal_the_base_without_any_adapter(
    finished: tuple[Path, str], evaluated: Path, tiny_base: Path
) -> None:
    """The base loaded by itself, nothing attached: an adapter that is only switched off must not show."""
    config = load_run_config(finished[0] / "config.yaml")
    base = build_base(Checkpoint.open(tiny_base), torch.device("cpu"), torch.float32, experts_per_chunk=16)
    samples = load_split(config.data, "test").examples
    loss = held_out_loss(base.model, samples, config.data.max_length).mean
    test = suites(evaluated)["test"]
    assert test["loss"]["base"]["value"] == pytest.approx(loss, abs=1e-5)
    assert abs(test["loss"]["adapter"]["value"] - loss) > 1e-2


def test_other_domains_and_plain_text_are_scored(evaluated: Path) -> None:
    found = suites(evaluated)
    # The run trained on rows of its own, so every shipped domain tells of retention.
    assert set(found) >= {"test", "legal", "creative", "plain text"}
    assert all(suite["rows"] > 0 for suite in found.values())
    assert found["legal"]["num_labels"] == 24 and "accuracy" not in found["plain text"]
    assert found["plain text"]["loss"]["base"]["value"] > 5


def test_answers_and_readme_are_written(evaluated: Path) -> None:
    summary = json.loads((evaluated / "summary.json").read_text())
    assert summary["answers"]["rows"] == 3 and summary["answers"]["base"]["cut"] == 3
    assert [summary["answers"]["exact"][who]["value"] for who in ("base", "adapter")] == [0, 0]  # all are cut
    text = (evaluated / "README.md").read_text()
    assert "McNemar" in text and "retention: legal" in text and "Generated answers (3 examples)" in text


def test_the_runs_page_shows_the_figures_of_answers(
    finished: tuple[Path, str], evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All answers of the adapter but one are corrected in the log: nothing is measured again."""
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    shutil.copytree(evaluated, run / "evaluation")
    rows = [parse_line(line) for line in (evaluated / "rows.jsonl").read_text().splitlines()]  # without checksums
    texts = [row for row in rows if row.get("measured") == "text"]
    for row in texts:
        row |= {"final": "I am sorry", "stopped": False, "error": "broken"} if row["who"] == "base" else {}
    right = [row for row in texts if row["who"] == "adapter"]
    for row in right[1:]:
        row |= {"final": row["answer"].upper() + ".", "stopped": True, "error": None}
    (run / "evaluation" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", str(run), "--retention", "4", "--generate", "3", "--max-tokens", "4"]) == 0
    answers = json.loads((run / "evaluation" / "summary.json").read_text())["answers"]
    base, adapter, exact = answers["base"], answers["adapter"], answers["exact"]
    assert (base["cut"], base["format_errors"], base["refusals"]) == (3, 3, 3)
    assert (adapter["cut"], adapter["stopped"], adapter["refusals"]) == (1, 2, 0)
    assert base["intervals"]["refusals"] == pytest.approx(binomtest(3, 3).proportion_ci(method="wilson"), abs=1e-9)
    assert (exact["base"]["value"], exact["adapter"]["value"]) == (0, pytest.approx(2 / 3))
    assert exact["mcnemar"] == {"lost": 0, "gained": 2, "p_value": 0.5}
    assert exact["difference"]["value"] == pytest.approx(2 / 3)
    assert str(run / "report.html") in capsys.readouterr().err
    page = (run / "report.html").read_text()
    assert "Equal to the answer: 2 examples became right and 0 wrong" in page and 'class="heat"' in page
    assert "McNemar" not in (finished[0] / "report.html").read_text()  # figures went elsewhere: --out


def test_one_test_record_has_no_interval(finished: tuple[Path, str], tmp_path: Path) -> None:
    assert (
        main(["evaluate", str(finished[0]), "--examples", "1", "--retention", "0", "--out", str(tmp_path / "o")]) == 0
    )
    test = suites(tmp_path / "o")["test"]
    assert test["rows"] == 1
    assert [test["loss"][who]["interval"] for who in ("base", "adapter", "difference")] == [None] * 3
    assert test["perplexity"]["base"]["interval"] is None
    assert "alone has no interval" in (tmp_path / "o" / "README.md").read_text()


def test_a_stopped_evaluation_resumes(
    finished: tuple[Path, str], evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (evaluated / "rows.jsonl").read_text().splitlines(keepends=True)
    half = tmp_path / "rows.jsonl"
    half.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:20])
    scored: list[int] = []
    real = measure.held_out_loss

    def counting(model, samples, *rest, **named):  # type: ignore[no-untyped-def]
        scored.append(len(samples))
        return real(model, samples, *rest, **named)

    monkeypatch.setattr(measure, "held_out_loss", counting)
    arguments = ["evaluate", str(finished[0]), "--out", str(tmp_path), "--retention", "4", "--generate", "3"]
    assert main([*arguments, "--max-tokens", "4"]) == 0
    in_all = sum('"measured": "score"' in line for line in lines)
    assert 0 < sum(scored) < in_all
    assert suites(tmp_path) == suites(evaluated)


def test_figures_of_another_evaluation_are_not_mixed_in(
    finished: tuple[Path, str], evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished[0]), "--out", str(evaluated), "--retention", "5"]) == 2
    assert "another evaluation" in capsys.readouterr().err


def test_training_records_among_the_test_records_are_counted(finished: tuple[Path, str], tmp_path: Path) -> None:
    workplace, copy = finished[0].parent, tmp_path / "copy.jsonl"
    unseen = (workplace / "test.jsonl").read_text().splitlines(keepends=True)[:4]
    copy.write_text((workplace / "train.jsonl").read_text() + "".join(unseen))  # the very file would be refused
    recipe = tmp_path / "seen.yaml"
    recipe.write_text((workplace / "small.yaml").read_text().replace(f"{workplace}/test.jsonl", str(copy)))
    arguments = ["--recipe", str(recipe), "--retention", "0", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(finished[0]), *arguments]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = summary["contamination"]
    assert found["seen"] == found["copies"] == found["rows"] - len(unseen) > 10
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()[1:]]
    own = [line for line in lines if line["who"] == "adapter"][-len(unseen) :]
    without = found["without_seen"]
    assert without["rows"] == len(unseen) and len(found["seen_ids"]) == found["seen"]
    nats = sum(line["nll"] for line in own) / sum(line["weight"] for line in own)
    assert without["loss"]["adapter"]["value"] == pytest.approx(nats)
    assert summary["suites"][0]["loss"]["adapter"]["value"] != pytest.approx(nats, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rows", "0"], 2, "--examples must be at least 1"),
        (["--retention", "-1"], 2, "--retention"),
        (["--recipe", "no_such"], 2, "no_such"),
    ],
)
def test_bad_options_are_named(
    finished: tuple[Path, str], arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished[0]), *arguments]) == code
    assert message in capsys.readouterr().err

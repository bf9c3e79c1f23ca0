"""`--json` of train and export: standard output is exactly one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import Train

from finetune.cli.main import main
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_and_its_export_print_json(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = train("--json", "trainer.max_steps=2", "evaluate.test_examples=4")
    told = json.loads(capsys.readouterr().out)
    assert code == 0 and told["status"] == "finished" and told["total_steps"] == 2
    assert Path(told["adapter"]) == run / "adapter" and Path(told["report"]).is_file()
    written = json.loads((run / "evaluation.json").read_text())
    assert written.pop("sha256").keys() == written.keys() and told["evaluation"] == written
    assert main(["export", str(run), "--to", "peft", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert json.loads((Path(told.pop("out")) / "export.json").read_text()) == told
    assert told["target"] == "peft"
    assert main(["export", str(run), "--to", "sglang"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(str(run / "export" / "sglang")), "without it: the place alone"


@pytest.mark.parametrize("words", [["--dry-run"], ["--sweep", "seed=0,1"]])
def test_json_without_a_result_is_refused(
    words: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(workplace / "small.yaml"), "--json", *words]) == ConfigError.exit_code
    assert f"--json does not go with {words[0]}" in capsys.readouterr().err

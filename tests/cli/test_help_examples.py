"""Every example of every `--help` is carried out, one after the other, in a directory as a newcomer would have it.

What needs the published models, a hub or a data set of one's own is not run here, and is listed with its reason.
"""

from __future__ import annotations

import gzip
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_help import COMMANDS, examples, parser_of

from finetune.cli.main import main
from finetune.config.paths import shipped_dir

NOT_RUN = {
    "finetune train legal_20b distributed=zero3 distributed.num_processes=2": "20b on two GPUs",
    "finetune data prepare medical --from ~/pubmedqa": "the published data set",
    "finetune experts score legal_20b": "20b",
    "finetune evaluate my-adapter --recipe legal_20b --base openai/gpt-oss-20b": "20b",
    "finetune adapter import downloaded --out mine --base openai/gpt-oss-20b": "20b",
}
FIRST = ("base", "train", "recipes", "data", "estimate", "config")  # what later examples need


def all_examples() -> list[str]:
    """The examples without remarks, those that make files first, and a run before what continues or sweeps."""
    order = [*FIRST, *(command for command in COMMANDS if command not in FIRST)]
    found = [
        re.split(r" +#", line)[0].strip()
        for command in order
        for line in examples(parser_of(command)[1].epilog)
        if "completion" not in line
    ]
    return list(dict.fromkeys(found))


def place(directory: Path, tiny_base: Path) -> None:
    """A base, own data in a recipe that fits the tiny base, a prompt, and a second run."""
    (directory / "base").mkdir()
    with gzip.open(shipped_dir("data") / "legal" / "cuad_clause_type.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [line for line in file if len(line) < 1500][:60]
    (directory / "mine.jsonl").write_text("".join(lines))
    (directory / "prompt.txt").write_text("Which law applies?\n")


@pytest.mark.slow
def test_every_example_of_the_help_does_what_it_says(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place(tmp_path, tiny_base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    todo = all_examples()
    assert set(NOT_RUN) <= set(todo), "an example that is not run has to be one"
    failed = []
    for line in todo:
        if line in NOT_RUN:
            continue
        before_example(line, tmp_path)
        words = shlex.split(re.split(r" [<>] ", line)[0])[1:]
        if " < " in line:
            monkeypatch.setattr("sys.stdin", io.StringIO((tmp_path / "prompt.txt").read_text()))
        elif words[0] == "chat":
            monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
        code = main(lighter(words))
        said = capfd.readouterr()
        if code:
            failed.append(f"{line}: exit {code}: {said.err[-600:]}")
    assert not failed, "\n".join(failed)


def before_example(line: str, directory: Path) -> None:
    """What a reader of the example has at hand."""
    if line.startswith("finetune recipes new") and (name := shlex.split(line)[3]):
        (directory / name).unlink(missing_ok=True)
    if "runs/second" in line and not (directory / "runs" / "second").exists():
        shutil.copytree(directory / "runs" / "first", directory / "runs" / "second")
    if "mine.yaml" in line and "recipes new" not in line:  # the recipe for the tiny base, whatever was written before
        main(["recipes", "new", "own.yaml", "--data", "mine.jsonl", "--model", "tiny"])
        if (directory / "own.yaml").exists():
            (directory / "own.yaml").replace(directory / "mine.yaml")


def lighter(words: list[str]) -> list[str]:
    """The same words with fewer steps and examples, so that the test ends in minutes."""
    if words[0] == "train" and "--dry-run" not in words and "--resume" not in words:
        few = ["trainer.max_steps=1"] if "--sweep" in words else ["trainer.max_steps=2"]
        return [*words, *few, "evaluate.test_examples=4", "evaluate.validation_examples=2", "export.read_back=never",
                "evaluate.labels=never"]  # fmt: skip
    if words[0] == "evaluate":
        return [*words, *([] if "--examples" in words else ["--examples", "4"])]
    if words[0] in ("generate", "chat"):
        return [*words, *([] if "--max-tokens" in words else ["--max-tokens", "4"])]
    return words

"""The command line: its imports, messages for mistakes, and exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from finetune.cli import main as cli
from finetune.cli.arguments import with_current_words
from finetune.errors import CheckError, Interrupted

HEAVY = ("torch", "transformers", "peft", "accelerate")
PROBE = """
import sys
from finetune.cli.main import main
try:
    code = main({arguments!r})
except SystemExit as stop:
    code = stop.code
print([name for name in {heavy!r} if name in sys.modules], code, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["base", "tiny", "--help"],
        ["recipes"],
        ["recipes", "show", "quickstart"],
        ["config", "show", "quickstart"],
        ["train", "legal_20b", "--dry-run"],
        ["checkpoints", "--help"],
        ["estimate", "--help"],
        ["estimate", "legal_120b", "--plan", "--gpus", "2"],
    ],
    ids=" ".join,
)
def test_quick_commands_do_not_import_torch(arguments):
    code = PROBE.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[] 0", done.stderr


def test_the_probe_sees_a_heavy_import():
    code = PROBE.format(arguments=["recipes"], heavy=("finetune.cli.recipes",))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "['finetune.cli.recipes'] 0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "quickstart"], "did you mean train?"),
        (["train"], "needs a recipe"),
        (["train", "seed=1", "quickstart"], "needs a recipe before seed=1"),
        (["train", "quickstrat"], "did you mean quickstart?"),
        (["train", "missing.yaml"], "no recipe file"),
        (["train", "quickstart", "--dryrun"], "did you mean --dry-run?"),
        (["train", "quickstart", "--dry"], "does not take --dry"),
        (["train", "quickstart", "--resume", "runs/x"], "keeps the configuration"),
        (["config", "shw", "quickstart"], "did you mean show?"),
        (["recipes", "show", "legal_20"], "did you mean legal_20b?"),
        (["base", "tiny"], "DIR"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named_with_a_fix(arguments, words, capsys):
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert "fix: " in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("adapter merge a:1 --out merge", "adapter combine a:1 --out merge"),
        ("adapter show merge", "adapter show merge"),
        ("evaluate runs/x --rows 3", "evaluate runs/x --examples 3"),
        ("evaluate runs/x --rows=3 --seed 1", "evaluate runs/x --examples=3 --seed 1"),
        ("train mine.yaml --rows 3", "train mine.yaml --rows 3"),
    ],
)
def test_words_of_0_1_are_understood(old, new):
    words = old.split()
    assert with_current_words(words, words[0]) == new.split()


def test_words_of_0_1_are_in_no_help(capsys):
    for command, word in (("evaluate", "--rows"), ("adapter", "merge ")):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert word not in capsys.readouterr().out
    assert cli.main(["adapter", "merge", "gone:1", "--out", "x"]) == 3
    assert cli.main(["evaluate", "gone", "--rows", "0"]) == 2


def test_overrides_may_follow_an_option(capsys):
    assert cli.main(["config", "show", "--json", "quickstart", "seed=5"]) == 0
    assert '"seed": 5' in capsys.readouterr().out


def test_missing_input_of_a_dry_run_is_exit_3(capsys, tmp_path):
    gone = tmp_path / "gone"
    assert cli.main(["train", "quickstart", "--dry-run", f"model.path={gone}"]) == 3
    assert str(gone) in capsys.readouterr().err
    assert cli.main(["train", "legal_20b", "--dry-run", "data.test.cuad.path=gone.jsonl"]) == 3
    assert "data.test.cuad.path" in capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """Stands for torch's class of this name."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CheckError("loss is nan", fix="lower the rate"), 6, "fix: lower the rate"),
        (Interrupted("stopped", signal_number=15), 143, "stopped"),
        (KeyboardInterrupt(), 130, "stopped"),
        (OutOfMemoryError("CUDA out of memory"), 4, "data.max_length"),
        (MemoryError(), 4, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 4, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 5, "runs/x"),
        (ValueError("odd"), 1, "a bug in gpt-oss-finetune"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_and_signals_have_their_exit_codes(error, code, words, monkeypatch, capsys):
    def end(_arguments):
        raise error

    monkeypatch.setattr(cli, "_run", end)
    assert cli.main([]) == code
    message = capsys.readouterr().err
    assert words in message
    assert ("Traceback" in message) == (code == 1)


def test_a_closed_pipe_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from finetune.cli.main import entry; entry()", "recipes"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_lists_only_commands_that_exist():
    for module, summary in cli.COMMANDS.values():
        loaded = __import__(module, fromlist=["run"])
        assert callable(loaded.run) and callable(loaded.add_arguments) and summary


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_grows_its_segments_unless_the_user_sets_it(own, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:64")
    assert cli.main(["recipes"]) == 0
    found = {name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")}
    assert found == ({own: "max_split_size_mb:64"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})

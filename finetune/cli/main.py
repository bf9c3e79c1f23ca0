"""The `finetune` command: runs a subcommand and turns its errors into a message and an exit code.

Only the chosen subcommand's module is imported, and none imports torch before it needs it, so that `--help`, `recipes`
and `config` start at once.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from finetune import __version__, log
from finetune.cli.arguments import Parser, parse, refuse_unknown_word, sentence, with_current_words
from finetune.errors import CapacityError, FinetuneError, InputError, Interrupted, MachineError, is_out_of_memory
from finetune.files import fix_for

# Command: its module, with `add_arguments(parser)` and `run(args)`, and its line in the list.
COMMANDS = {
    "train": ("finetune.cli.train", "fine-tune by a recipe, or resume a run"),
    "data": ("finetune.cli.data", "show or count a recipe's tokens, trained ones and context"),
    "estimate": ("finetune.cli.estimate", "estimate memory, disk and time of a recipe without a download"),
    "recipes": ("finetune.cli.recipes", "list the recipes, show one, or write one for your own data"),
    "config": ("finetune.cli.config", "show a recipe's settings, differences, or a JSON schema for editors"),
    "export": ("finetune.cli.export", "write a run's adapter, or base and adapter merged, for a serving stack"),
    "experts": ("finetune.cli.experts", "measure which experts a recipe's data uses, to train only those"),
    "evaluate": ("finetune.cli.evaluate", "compare a run with its base: test examples, retention, answers"),
    "generate": ("finetune.cli.generate", "answer a prompt with the base and with base + adapter"),
    "chat": ("finetune.cli.chat", "chat with a run's model"),
    "checkpoints": ("finetune.cli.checkpoints", "verify a run's checkpoints"),
    "adapter": ("finetune.cli.adapter", "show, import or combine adapters"),
    "report": ("finetune.cli.report", "rewrite a run's report.html and report.md"),
    "doctor": ("finetune.cli.doctor", "check this machine: packages, GPU, disk, network, with fixes"),
    "completion": ("finetune.cli.completion", "complete commands, recipes and keys in bash, zsh or fish"),
    "base": ("finetune.cli.base", "make a tiny gpt-oss in the published file layout"),
}
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
_NOT_UTF8 = "its name would have to stand in recipes, JSON and safetensors files, which are"
_SMALLER_STEPS = (
    "shorten data.max_length, lower trainer.micro_batch_size or model.experts_per_chunk, keep "
    "trainer.activation_checkpointing=true, or lower adapter.experts.rank"
)
_LESS_MEMORY = {
    "": _SMALLER_STEPS,
    "train": _SMALLER_STEPS,
    "export": "free memory, or export on a machine with more; --no-verify leaves out the comparison, which needs most",
}
_FIRST_STEPS = """first steps:
  finetune doctor                                     # is this machine ready?
  finetune base tiny base/tiny                        # a gpt-oss small enough for a CPU
  finetune train quickstart                           # fine-tune it: minutes
  finetune recipes new mine.yaml --data mine.jsonl    # a recipe for your own file
  finetune COMMAND --help                             # what a command takes, with examples"""
_EXIT_CODES = """exit codes: 0 done, 1 a bug in this tool, 2 configuration, 3 the data, checkpoint or adapter given,
4 does not fit into memory, 5 this machine (network, disk, packages), 6 a check failed, 130 and 143 signals"""


def entry() -> NoReturn:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that a terminal's encoding lacks are spelt out
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run a command.

    Args:
        arguments: the words after `finetune` on the command line.

    Returns:
        The exit code (docs/design.md lists them).
    """
    # Waiting threads that spin made a step 20 times slower on a busy machine (docs/log.md). Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Sequences of all lengths fragment a GPU's memory; segments that can grow prevent that. The first of the two names
    # is the newer one; a value that the user has set under either is kept.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    try:
        try:
            _run(list(arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe (`finetune recipes | head -1`); the flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        log.info("\nstopped")
        return 130
    except Exception as error:
        return _report(error, _command(arguments))
    return 0


def _command(arguments: Sequence[str]) -> str:
    """The first word that is no option, "" if there is none."""
    return next((word for word in arguments if not word.startswith("-")), "")


def _is_utf8(text: str) -> bool:
    """Whether the system's bytes for a text were UTF-8: others come as half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _refuse_unprintable(arguments: Sequence[str]) -> None:
    """Refuse names that are not UTF-8 before anything is read: recipes, JSON and safetensors cannot hold them."""
    for word in arguments:
        if not _is_utf8(word):
            raise InputError(f"{log.printable(word)} is not UTF-8", why=_NOT_UTF8, fix="rename the file or directory")
    if arguments and not _is_utf8(os.getcwd()):
        raise MachineError(
            f"the working directory {log.printable(os.getcwd())} is not UTF-8",
            why=_NOT_UTF8,
            fix="rename it, or start from another one",
        )


def _run(arguments: list[str]) -> None:
    chosen = _command(arguments) or None
    _refuse_unprintable(arguments)
    parser = Parser(
        prog="finetune",
        description="Fine-tune gpt-oss with LoRA on attention and on every expert, over native MXFP4 weights.",
        epilog=f"{_FIRST_STEPS}\n\n{_EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"gpt-oss-finetune {__version__}")
    refuse_unknown_word(chosen, COMMANDS, "finetune")
    arguments = with_current_words(arguments, chosen)
    usage = ""
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(command, help=summary, description=sentence(summary))
        if command == chosen:
            import_module(module).add_arguments(subparser)
            usage = subparser.format_usage()
    args = parse(parser, arguments, usage)
    if args.command is None:
        parser.print_help()
        return
    import_module(COMMANDS[args.command][0]).run(args)


def _report(error: Exception, command: str) -> int:
    """Print an error and choose the exit code."""
    known = error if isinstance(error, FinetuneError) else _as_known(error, command)
    if known is None:
        print(log.safe("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        log.error(
            f"error: this is a bug in gpt-oss-finetune {__version__}, not in your input; please report the lines above"
        )
        return 1
    # The user asked to stop, so this is no error.
    log.error(str(known) if isinstance(known, Interrupted) else f"error: {known}")
    return known.exit_code


def _as_known(error: Exception, command: str) -> FinetuneError | None:
    """Recognise failures of the machine, which any code may raise."""
    if is_out_of_memory(error):
        first = (str(error).splitlines() or ["out of memory"])[0]
        return CapacityError(
            f"out of memory: {first}",
            fix=_LESS_MEMORY.get(command, "free memory, or run the command on a machine with more"),
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return MachineError(f"the disk is full{where}", fix="free some space, or set output_dir to another disk")
    if isinstance(error, OSError) and error.filename and error.errno in _NO_ACCESS:
        return MachineError(f"{error.filename}: {error.strerror}", fix=fix_for(error, "choose another place"))
    return None

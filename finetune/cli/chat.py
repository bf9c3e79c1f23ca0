"""`finetune chat RUN`: a conversation with base + adapter, or with the base for comparison."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from finetune import log
from finetune.adapters.config_file import resolve_run
from finetune.cli.arguments import add_examples
from finetune.cli.generate import add_conversation, add_sampling, answer, check_sampling, prompt_ids, sampling_of

_HELP = "/base and /adapter choose the model, /reset clears the conversation, /quit (or Ctrl-D) ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory, or an adapter directory")
    add_conversation(parser)
    add_sampling(parser)
    parser.epilog = f"during the chat: {_HELP}"
    add_examples(
        parser,
        "finetune chat runs/first",
        'finetune chat runs/first --developer "Answer with the name of the clause." --effort low',
    )


def run(args: argparse.Namespace) -> None:
    """Chat until the input ends.

    Raises:
        ConfigError: an option out of its range, or the conversation no longer fits the model.
    """
    check_sampling(args)
    resolve_run(args.run)
    log.info(log.LOADING)
    from finetune.evaluate.generation import read_completion
    from finetune.evaluate.opening import open_model

    opened = open_model(args.run, base=args.base, revision=args.revision, device=args.device)
    log.info(_HELP)
    messages: list[dict[str, str]] = []
    with_adapter = True
    while (line := _read_line("adapter" if with_adapter else "base")) is not None:
        match line.strip():
            case "":
                continue
            case "/quit":
                return
            case "/reset":
                messages = []
            case "/base" | "/adapter" as model:
                with_adapter = model == "/adapter"
            case command if command.startswith("/"):
                log.info(f"there is no {command}: {_HELP}")
            case text:
                messages.append({"role": "user", "content": text})
                ids = prompt_ids(opened, messages, args)
                tokens = answer(opened, ids, sampling_of(args), with_adapter=with_adapter, stream=True)
                completion = read_completion(tokens)
                if completion.error or not completion.final:
                    # An answer that harmony cannot read must not get into the next prompt.
                    log.warning(f"this turn is forgotten: {completion.error or 'it has no final text'}")
                    messages.pop()
                else:
                    messages.append({"role": "assistant", "content": completion.final})


def _read_line(model: str) -> str | None:
    """A line of input, or None at its end."""
    if sys.stdin.isatty():
        print(f"you -> {model}> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line if line else None

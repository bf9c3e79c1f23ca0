"""`finetune generate RUN "..."`: answers of the base and of base + adapter, streamed with harmony's channels."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import log
from finetune.adapters.config_file import resolve_run
from finetune.cli.arguments import add_base, add_examples
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.evaluate.generation import Sampling
    from finetune.evaluate.opening import LoadedModel

WHICH = ("both", "base", "adapter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory, or an adapter directory")
    parser.add_argument("prompt", metavar="PROMPT", help="the user's message; - reads standard input")
    parser.add_argument("--which", choices=WHICH, default="both", help="base, base + adapter, or both (default)")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end instead of streaming")
    add_conversation(parser)
    add_sampling(parser)
    add_examples(
        parser,
        'finetune generate runs/first "Which law applies to this clause? ..."',
        "finetune generate runs/first - --which adapter --json < prompt.txt",
        'finetune generate runs/first "..." --effort high --temperature 0.7 --max-tokens 1024',
    )


def add_conversation(parser: argparse.ArgumentParser) -> None:
    """Add the options of the prompt that `generate` and `chat` share."""
    parser.add_argument("--developer", metavar="TEXT", help="instructions, as harmony's developer message")
    parser.add_argument("--effort", choices=("low", "medium", "high"), help="reasoning effort (default: the run's)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling and of the base, which `evaluate` has too."""
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="new tokens per answer (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="share of probability to choose among (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")
    add_base(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as in the run")


def run(args: argparse.Namespace) -> None:
    """Generate, and print the answers.

    Raises:
        ConfigError: an option out of its range, or an empty prompt.
    """
    check_sampling(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    resolve_run(args.run)
    log.info(log.LOADING)
    from finetune.evaluate.generation import read_completion
    from finetune.evaluate.opening import open_model

    opened = open_model(args.run, base=args.base, revision=args.revision, device=args.device)
    ids = prompt_ids(opened, [{"role": "user", "content": prompt}], args)
    results: dict[str, Any] = {}
    for name in ("base", "adapter"):
        if args.which not in ("both", name):
            continue
        if not args.json:
            log.result(f"--- {'base' if name == 'base' else 'base + adapter'} ---")
        tokens = answer(opened, ids, sampling_of(args), with_adapter=name == "adapter", stream=not args.json)
        completion = read_completion(tokens)
        results[name] = {
            "final": completion.final,
            "analysis": completion.analysis,
            "stopped": completion.stopped,
            "error": completion.error,
            "tokens": tokens,
        }
        if completion.error:
            log.warning(f"{name}: not in harmony's format: {completion.error}")
        if not completion.stopped:
            log.info(f"({name}: cut after {len(tokens)} tokens, --max-tokens)")
    if args.json:
        log.result(json.dumps({"prompt_tokens": len(ids), **results}, ensure_ascii=False, indent=2))


def check_sampling(args: argparse.Namespace) -> None:
    """Check the ranges of the sampling options.

    Raises:
        ConfigError: an option is out of its range.
    """
    for name, value, fits, range_ in (
        ("--max-tokens", args.max_tokens, args.max_tokens >= 1, "at least 1"),
        ("--temperature", args.temperature, 0 <= args.temperature < float("inf"), "0 or more"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "above 0 and at most 1"),
    ):
        if not fits:
            raise ConfigError(f"{name} must be {range_}, not {value}")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Convert the options for generation."""
    from finetune.evaluate.generation import Sampling

    return Sampling(args.max_tokens, args.temperature, args.top_p, args.seed)


def prompt_ids(opened: LoadedModel, messages: list[dict[str, str]], args: argparse.Namespace) -> list[int]:
    """Render a conversation up to the model's turn.

    Raises:
        ConfigError: a message cannot be used, or prompt and answer do not fit the model's positions.
    """
    from finetune.data.checks import BadRecordError
    from finetune.data.harmony.render import render_prompt
    from finetune.data.sources import parse_record, raw_record

    if args.developer:
        messages = [{"role": "developer", "content": args.developer}, *messages]
    # A record ends with an answer; `render_prompt` leaves it out.
    raw = {"messages": [*messages, {"role": "assistant", "content": "."}]} | (
        {"reasoning_effort": args.effort} if args.effort else {}
    )
    try:
        ids = render_prompt(parse_record(raw_record("the prompt", raw), "messages"), opened.data)
    except BadRecordError as error:
        raise ConfigError(f"the prompt cannot be used: {error.reason}") from error
    longest = opened.base.model.config.max_position_embeddings
    if len(ids) + args.max_tokens > longest:
        raise ConfigError(
            f"the prompt has {len(ids):,} tokens; with --max-tokens {args.max_tokens:,} that is more than the model's "
            f"{longest:,} positions"
        )
    return ids


def answer(opened: LoadedModel, ids: list[int], sampling: Sampling, *, with_adapter: bool, stream: bool) -> list[int]:
    """Generate one answer; with `stream`, print it token by token."""
    from finetune.evaluate.generation import generate

    printer = _Printer() if stream else None
    with nullcontext() if with_adapter else opened.adapter.disabled():
        (tokens,) = generate(opened.base.model, [ids], sampling, printer.take if printer else lambda *_: None)
    if printer:
        printer.close(tokens)
    return tokens


class _Printer:
    """Streams text to standard output, with a label whenever the channel changes."""

    def __init__(self) -> None:
        from finetune.evaluate.generation import TextStream

        self._stream, self._channel, self._broken = TextStream(), "", False

    def take(self, _: int, token: int) -> None:
        """Print the text that a token completes; nothing after a token that harmony does not allow."""
        from openai_harmony import HarmonyError

        if self._broken:
            return
        try:
            found = self._stream.take(token)
        except HarmonyError:
            self._broken = True
            return
        if found is None:
            return
        channel, text = found
        if channel != self._channel:
            print(f"{chr(10) if self._channel else ''}[{channel}] ", end="")
            self._channel = channel
        print(harmless(text), end="", flush=True)

    def close(self, tokens: list[int]) -> None:
        """End the line; tokens that gave no text at all are printed as they are."""
        from finetune.data.harmony.tokenizer import harmony_encoding

        print("" if self._channel else f"[unreadable] {harmless(harmony_encoding().decode(tokens))!r}", flush=True)


def harmless(text: str) -> str:
    """Replace characters that could control a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)

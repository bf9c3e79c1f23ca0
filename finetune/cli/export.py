"""`finetune export RUN --to TARGET`: write the adapter, or the base with the adapter merged, for a serving stack."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from finetune import log
from finetune.adapters.config_file import resolve_run, why_unfinished
from finetune.cli.arguments import add_base, add_examples
from finetune.config.suggest import suggest_word
from finetune.errors import ConfigError, InputError
from finetune.export.options import (
    ADAPTER_TARGETS,
    DEFAULT_ROUNDING,
    MERGED_TARGETS,
    ROUNDINGS,
    SUMMARIES,
    ExportOptions,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    width = max(map(len, SUMMARIES))
    parser.epilog = "targets:\n" + "\n".join(f"  {name:{width}}  {line}" for name, line in SUMMARIES.items())
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory, or an adapter directory")
    parser.add_argument("--to", metavar="TARGET", required=True, help="target (see below)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="output; must not exist (default: RUN/export/TARGET)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, tensor by tensor")
    add_base(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not verify the result in a fresh process")
    parser.add_argument(
        "--gguf-experts", choices=("bf16", "mxfp4"), default="bf16", help="how a merged GGUF stores experts"
    )
    parser.add_argument(
        "--rounding", choices=ROUNDINGS, help=f"rounding of experts to MXFP4 (default: {DEFAULT_ROUNDING})"
    )
    parser.add_argument(
        "--calibration",
        metavar="RUN_OR_RECIPE",
        help="whose training examples calibrate the rounding (default: RUN)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end: export.json, directory")
    parser.add_argument("--unfinished", action="store_true", help="also an adapter whose run did not finish or failed")
    parser.add_argument("--pad-rank", action="store_true", help="peft: pad the rank to one that vLLM serves")
    add_examples(
        parser,
        "finetune export runs/first --to peft",
        "finetune export runs/first --to mxfp4 --dry-run     # the plan, tensor by tensor",
        "finetune export runs/first --to gguf --gguf-experts mxfp4 --out first.gguf",
    )


def run(args: argparse.Namespace) -> None:
    """Export, and print the output directory.

    Raises:
        ConfigError: no such target, or `--json` where nothing is written.
        InputError: the adapter's run did not finish, and `--unfinished` is not given.
    """
    if args.json and args.dry_run:
        raise ConfigError("--json does not go with --dry-run", fix="leave one of the two out")
    with log.results_to_stderr(args.json):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    target = args.to
    if target not in SUMMARIES:
        fix = suggest_word(target, list(SUMMARIES)) or f"one of {', '.join(SUMMARIES)}"
        raise ConfigError(f"cannot export to {target!r}", fix=fix)
    directory, run_directory = resolve_run(args.run)
    from finetune.adapters.store import AdapterFile

    if (why := why_unfinished(directory, run_directory)) is not None:
        if not args.unfinished:
            raise InputError(
                f"{directory} is not finished: {why}",
                why="it may not be the model that was trained",
                fix=f"finish the run: finetune train --resume {run_directory}; --unfinished exports it as it is",
            )
        log.warning(f"{directory} is not finished: {why}")
    source = AdapterFile.open(directory)
    out = args.out or _default_out(directory, run_directory, target)
    options = ExportOptions(
        base=args.base,
        revision=args.revision,
        dry_run=args.dry_run,
        verify=not args.no_verify,
        gguf_experts=args.gguf_experts,
        rounding=args.rounding,
        calibration=args.calibration,
        pad_rank=args.pad_rank,
    )
    match target:
        case _ if target in MERGED_TARGETS:
            from finetune.export.targets.merged import export_merged

            try:
                export_merged(source, target, out, options, run_directory)
            finally:
                _report(run_directory)
        case _ if target in ADAPTER_TARGETS:
            from finetune.export.adapters import export_adapter

            export_adapter(source, target, out, options, run_directory)
    if args.json:
        facts = out / "export.json"
        log.result_json({"out": str(out)} | (json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}))
    elif not args.dry_run:
        log.result(str(out))


def _report(run: Path | None) -> None:
    """Rewrite the run's reports if a merge, even a refused one, has left survival figures."""
    if run is not None and any(run.glob("survival-*.json")):
        from finetune.report.html import write_reports

        write_reports(run)


def _default_out(directory: Path, run_directory: Path | None, target: str) -> Path:
    if run_directory is not None:
        return run_directory / "export" / target
    return directory.with_name(f"{directory.name}-{target}")

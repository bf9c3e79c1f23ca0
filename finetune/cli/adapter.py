"""`finetune adapter`: show an adapter, import one of another tool, combine several."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from finetune import log
from finetune.adapters.config_file import resolve_run
from finetune.cli.arguments import add_action, add_base, add_examples

USAGE = {
    "show": "finetune adapter show DIR [--json]",
    "import": "finetune adapter import DIR --out DIR [--base BASE]",
    "combine": "finetune adapter combine RUN:WEIGHT [DIR:WEIGHT ...] --out DIR [--rank R]",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = add_action(actions, "show", "show an adapter's sites, ranks, scales and norms", usage=USAGE["show"])
    show.add_argument("directory", metavar="DIR", type=Path, help="a run, or an adapter directory")
    show.add_argument("--json", action="store_true", help="every site, as JSON")
    read = add_action(actions, "import", "convert an adapter of another tool to this layout", usage=USAGE["import"])
    read.add_argument(
        "directory", metavar="DIR", type=Path, help="as PEFT of any version writes it, or factors expert by expert"
    )
    read.add_argument("--out", metavar="DIR", type=Path, required=True, help="where; must not exist")
    add_base(read, "directory or hub name of its base: checked and recorded")
    combine = add_action(actions, "combine", "combine adapters of one base into one", usage=USAGE["combine"])
    combine.add_argument("parts", metavar="DIR:WEIGHT", nargs="+", help="an adapter and its weight (default: 1)")
    combine.add_argument("--out", metavar="DIR", type=Path, required=True, help="where; must not exist")
    add_examples(
        parser,
        "finetune adapter show runs/first",
        "finetune adapter import downloaded --out mine --base openai/gpt-oss-20b",
        "finetune adapter combine runs/first:0.5 runs/second:0.5 --out both --rank 16",
    )
    combine.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="highest rank of the result, by SVD, with the error printed (default: exact)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the chosen action."""
    match args.action:
        case "show":
            _show(args.directory, as_json=args.json)
        case "import":
            from finetune.export.importing import import_adapter
            from finetune.export.options import ExportOptions

            import_adapter(args.directory, args.out, ExportOptions(base=args.base, revision=args.revision))
            log.result(str(args.out))
        case "combine":
            from finetune.export.combine import combine_adapters, describe_reductions, parse_weighted

            costs = combine_adapters([parse_weighted(part) for part in args.parts], args.out, args.rank)
            for line in describe_reductions(costs):
                log.info(line)
            log.result(str(args.out))


def _show(directory: Path, *, as_json: bool) -> None:
    adapter, _ = resolve_run(directory)
    from finetune.adapters.store import AdapterFile
    from finetune.export import show
    from finetune.export.base import known_arch
    from finetune.export.factors import SWAPPING_RELEASE, is_swapped

    source = AdapterFile.open(adapter)
    if is_swapped(source, known_arch(source)):
        log.warning(
            f"expert factors are the wrong way round, as PEFT {SWAPPING_RELEASE} wrote them: finetune adapter import"
        )
    sites = show.measure(source)
    if as_json:
        log.result(json.dumps(show.as_json(source, sites), indent=2))
        return
    for line in show.as_lines(source, sites):
        log.result(line)

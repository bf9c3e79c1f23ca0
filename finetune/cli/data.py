"""`finetune data`: preview and count a recipe's tokens, and build data sets that packages may not contain."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import log
from finetune.cli.arguments import add_action, add_examples, add_recipe, recipe_and_overrides
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
    from finetune.data.dataset import Split

_PREVIEW_USAGE = "finetune data preview RECIPE [key=value ...] [-n COUNT] [--split NAME] [--html FILE] [--json]"
_STATS_USAGE = "finetune data stats RECIPE [key=value ...] [--json] [--no-duplicates]"
_LEFT_OUT_SHOWN = 100
_PREPARE_USAGE = "finetune data prepare legal|medical|creative [--from DIR_OR_ADDRESS] [--out FILE]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    preview = add_action(actions, "preview", "show examples as tokens, trained ones and context")
    add_recipe(preview, _PREVIEW_USAGE)
    preview.add_argument("-n", type=int, default=3, metavar="COUNT", help="examples, spread over the split (3)")
    preview.add_argument("--split", choices=["train", "validation", "test"], default="train", help="(train)")
    preview.add_argument("--html", metavar="FILE", type=Path, help="write a page instead of printing")
    preview.add_argument("--json", action="store_true", help="as JSON")
    stats = add_action(actions, "stats", "count records, tokens, lengths, omissions and duplicates")
    add_recipe(stats, _STATS_USAGE)
    stats.add_argument("--json", action="store_true", help="as JSON")
    stats.add_argument("--no-duplicates", action="store_true", help="do not compare records with each other")
    prepare = add_action(actions, "prepare", "build a shipped data set from its public source, byte for byte")
    domains = ["legal", "medical", "creative"]
    prepare.add_argument("domain", choices=domains, help="only medical is missing from packages")
    prepare.add_argument("--from", dest="source", metavar="DIR_OR_ADDRESS", help="a clone or mirror of its source")
    prepare.add_argument("--out", metavar="FILE", type=Path, help="build it into this file, even if it is there")
    parser.usage = f"{_PREVIEW_USAGE}\n       {_STATS_USAGE}\n       {_PREPARE_USAGE}"
    add_examples(
        parser,
        "finetune data preview mine.yaml -n 5                # marked text is trained, the rest is context",
        "finetune data preview medical_20b --split test --html preview.html",
        "finetune data stats mine.yaml data.max_length=4096  # omissions with another length",
        "finetune data prepare medical --from ~/pubmedqa",
    )


def run(args: argparse.Namespace) -> None:
    """Print examples or figures, or build a file and print its path."""
    if args.action == "prepare":
        from finetune.data.prepare.build import prepare

        log.result(str(prepare(args.domain, args.source, args.out)))
        return
    from finetune.config.compose import compose

    recipe, overrides = recipe_and_overrides(args)
    composed = compose(recipe, overrides)
    if args.action == "stats":
        _stats(composed.config, args)
    else:
        _preview(composed.config, composed.recipe_name, args)


def _stats(config: RunConfig, args: argparse.Namespace) -> None:
    from finetune.data.stats import collect, describe_stats
    from finetune.log import printable

    result = collect(config, duplicates=not args.no_duplicates)
    lines = printable("\n".join(describe_stats(result)).rstrip())
    log.result(json.dumps(result.as_json(), indent=2) if args.json else lines)


def _preview(config: RunConfig, recipe: str, args: argparse.Namespace) -> None:
    from finetune.data.dataset import check_left_out, load_split, report_left_out, report_split
    from finetune.data.preferences import PREFERENCE_KEYS
    from finetune.data.preview import as_html, as_json, as_text, spread

    if args.n < 1:
        raise ConfigError(f"-n is {args.n}, must be at least 1")
    if args.html and args.json:
        raise ConfigError("--html does not go with --json", fix="give one of them")
    split = load_split(config.data, args.split, check=False)
    if not split.examples:
        check_left_out(config.data, args.split, split.stats, _LEFT_OUT_SHOWN)
    report_split(split)
    report_left_out(split, _LEFT_OUT_SHOWN)
    if split.stats.forms.keys() & PREFERENCE_KEYS.keys():
        _preview_pairs(split, recipe, args)
        return
    examples = [split.examples[number] for number in spread(len(split.examples), args.n)]
    if args.html:
        args.html.write_text(as_html(f"{recipe}: {args.split}", examples), encoding="utf-8")
        log.info(f"{args.html}: {len(examples)} examples")
    elif args.json:
        log.result(json.dumps([as_json(example) for example in examples], indent=2))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        log.result("\n\n".join(as_text(example, colour=colour) for example in examples), styled=True)


def _preview_pairs(split: Split, recipe: str, args: argparse.Namespace) -> None:
    """Show records with their answers side by side; `-n` counts records."""
    from finetune.data.preview import spread
    from finetune.data.preview_pairs import group_as_json, group_as_text, groups_as_html, groups_of

    starts = split.first_examples()
    groups = groups_of(split.examples, [starts[number] for number in spread(len(starts), args.n)])
    if args.html:
        args.html.write_text(groups_as_html(f"{recipe}: {args.split}", groups), encoding="utf-8")
        log.info(f"{args.html}: {len(groups)} records")
    elif args.json:
        log.result(json.dumps([group_as_json(group) for group in groups], indent=2))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        width = shutil.get_terminal_size((120, 24)).columns
        log.result("\n\n".join(group_as_text(group, colour=colour, width=width) for group in groups), styled=True)

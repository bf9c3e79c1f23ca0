"""`finetune config`: the composed configuration, differences between configurations, and a JSON schema for editors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from finetune import log
from finetune.cli.arguments import add_action, add_examples, add_recipe, recipe_and_overrides
from finetune.config.fields import Plain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = add_action(actions, "show", "print the whole configuration as YAML")
    add_recipe(show, "finetune config show RECIPE [key=value ...] [--json]")
    show.add_argument("--json", action="store_true", help="as JSON")
    diff = add_action(actions, "diff", "print differences from the defaults, or between two recipes or runs")
    add_recipe(diff, "finetune config diff RECIPE_OR_RUN [RECIPE_OR_RUN] [key=value ...] [--json]")
    diff.add_argument("--json", action="store_true", help="as JSON")
    add_action(actions, "schema", "print a JSON schema of recipes, for editors")
    add_examples(
        parser,
        "finetune config show legal_20b                      # every key with its value",
        "finetune config diff mine.yaml                      # differences from the defaults",
        "finetune config diff runs/first runs/second",
        "finetune config schema > recipe.schema.json",
    )


def run(args: argparse.Namespace) -> None:
    """Print to standard output.

    Raises:
        ConfigError: a recipe that does not exist or cannot be composed.
    """
    match args.action:
        case "show":
            _show(args)
        case "diff":
            _diff(args)
        case "schema":
            from finetune.config.json_schema import recipe_schema

            log.result(json.dumps(recipe_schema(), indent=2))


def _show(args: argparse.Namespace) -> None:
    from finetune.config.compose import compose
    from finetune.config.derive import deepspeed_lines
    from finetune.config.validate import dump_yaml, to_plain

    recipe, overrides = recipe_and_overrides(args)
    config = compose(recipe, overrides).config
    if args.json:
        log.result(json.dumps(to_plain(config), indent=2))
        return
    log.result(dump_yaml(config).rstrip())
    for line in deepspeed_lines(config):
        log.result(f"# {line}")


def _diff(args: argparse.Namespace) -> None:
    from finetune.config.differences import defaults, differences

    first, rest = recipe_and_overrides(args)
    if rest and "=" not in rest[0]:
        before, after = _plain(first, []), _plain(rest[0], rest[1:])
    else:
        after = _plain(first, rest)
        before = defaults(after)
    found = differences(before, after)
    if args.json:
        log.result(json.dumps([vars(difference) for difference in found], indent=2))
        return
    for difference in found:
        log.result(difference.describe())
    if not found:
        log.info("no differences")


def _plain(recipe_or_run: str, overrides: list[str]) -> Plain:
    """Read a recipe with overrides, or the configuration of a run, as plain data.

    Raises:
        ConfigError: overrides on a run, which keeps its configuration.
    """
    from finetune.config.compose import compose
    from finetune.config.validate import load_run_config, to_plain
    from finetune.errors import ConfigError

    if (Path(recipe_or_run) / "config.yaml").is_file():
        if overrides:
            raise ConfigError(f"{recipe_or_run} is a run: it takes no overrides")
        return to_plain(load_run_config(Path(recipe_or_run) / "config.yaml"))
    return to_plain(compose(recipe_or_run, overrides).config)

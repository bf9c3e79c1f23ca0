"""`finetune experts score`: use of experts by a recipe's training data, for `adapter.experts.select` and `.rank_by`."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune import log
from finetune.cli.arguments import add_action, add_examples, add_recipe, recipe_and_overrides
from finetune.config.expert_selection import parse_select
from finetune.errors import ConfigError

_USAGE = """finetune experts score RECIPE [key=value ...] [--select top_p=0.2] [--by gate|tokens] [--examples N]
                              [--out FILE]"""
_DEFAULT = "top_p=0.2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    score = add_action(actions, "score", "measure the use of experts by the training data, and select some")
    add_recipe(score, _USAGE)
    score.add_argument("--select", metavar="RULE", help="top_p=SHARE or top_k=COUNT (the recipe's, else top_p=0.2)")
    score.add_argument("--by", choices=["gate", "tokens"], default="gate", help="the score to select by (gate)")
    score.add_argument("--examples", type=int, default=128, metavar="N", help="training examples at most (128)")
    score.add_argument("--out", metavar="FILE", type=Path, help="the file to write (RECIPE.experts.json)")
    parser.usage = _USAGE
    add_examples(
        parser,
        "finetune experts score legal_20b                    # writes legal_20b.experts.json",
        "finetune experts score mine.yaml --select top_k=8 --examples 256",
        "finetune train mine.yaml adapter.experts.select=mine.experts.json",
    )


def run(args: argparse.Namespace) -> None:
    """Score the experts and write the file.

    Raises:
        ConfigError: the rule is not valid, or the file exists.
    """
    from finetune.config.compose import compose

    recipe, overrides = recipe_and_overrides(args)
    composed = compose(recipe, overrides)
    of_recipe = composed.config.adapter.experts.select
    select = args.select or (of_recipe if of_recipe.startswith("top_") else _DEFAULT)
    try:
        kind = parse_select(select).kind
    except ValueError as error:
        raise ConfigError(f"--select {select}: {error}") from error
    if kind not in ("top_p", "top_k"):
        raise ConfigError(f"--select {select}: must be top_p=SHARE or top_k=COUNT", fix=f"--select {_DEFAULT}")
    if args.examples < 1:
        raise ConfigError(f"--examples is {args.examples}, must be at least 1")
    out = args.out or Path(f"{composed.recipe_name}.experts.json")
    if out.exists():
        raise ConfigError(f"{out} exists already", fix="choose another with --out")

    from finetune.config.expert_selection import write_expert_scores
    from finetune.data.dataset import load_split, report_split
    from finetune.evaluate.expert_scores import score_experts
    from finetune.model.open import open_base

    config = composed.config
    split = load_split(config.data, "train")
    report_split(split)
    base = open_base(config.model)
    scores = score_experts(base, config.model.path, split.examples, config.data, select, args.by, args.examples)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_expert_scores(out, scores)
    for line in scores.describe():
        log.result(line)
    log.result(f"{out}: train with adapter.experts.select={out}, or adapter.experts.rank_by={out}")

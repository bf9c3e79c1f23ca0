"""`finetune estimate`: memory, disk and time of a recipe from config.json alone, without a download."""

from __future__ import annotations

import argparse
import json

from finetune import log
from finetune.cli.arguments import add_examples, add_recipe, recipe_and_overrides
from finetune.errors import CapacityError, ConfigError, InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_recipe(parser, "finetune estimate RECIPE [key=value ...] [--gpu-gib 80] [--gpus N] [--plan] [--json]")
    parser.add_argument(
        "--gpu-gib", type=float, default=80.0, metavar="N", help="the GPU's nominal memory (default: 80)"
    )
    parser.add_argument("--gpu-tflops", type=float, default=None, metavar="N", help="its bfloat16 peak (default: 989)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: 1)")
    parser.add_argument("--plan", action="store_true", help="propose settings for these GPUs")
    parser.add_argument("--json", action="store_true", help="as JSON, sizes in bytes")
    add_examples(
        parser,
        "finetune estimate legal_20b",
        "finetune estimate legal_20b --gpu-gib 24 adapter=attention_only",
        "finetune estimate legal_120b --gpus 2 --plan",
    )


def run(args: argparse.Namespace) -> None:
    """Print the estimate.

    Raises:
        ConfigError: a number of GPUs or a size that is not above 0.
        InputError: the base's sizes are not known here.
        CapacityError: the recipe does not fit; raised after the estimate is printed.
    """
    from finetune.config.compose import compose
    from finetune.estimate.fit import Budget
    from finetune.estimate.inputs import PUBLISHED, find_base
    from finetune.estimate.report import as_data, describe, make_estimate, verdict
    from finetune.machine import free_memory

    for name in ("gpu_gib", "gpus"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name):g}, must be above 0")
    recipe, overrides = recipe_and_overrides(args)
    composed = compose(recipe, overrides)
    base = find_base(composed.config.model.path)
    if base is None:
        raise InputError(
            f"the sizes of {composed.config.model.path} are not known here",
            why="an estimate reads config.json and downloads nothing",
            fix=f"give a local directory, or estimate with model.path={PUBLISHED[0]} if it has that size",
        )
    on_cpu = composed.config.model.device == "cpu"
    budget = Budget.of_host(free_memory()) if on_cpu else Budget.of_card(args.gpu_gib)
    estimate = make_estimate(
        composed.config, composed.recipe_name, base, budget, gpus=args.gpus, plan=args.plan, tflops=args.gpu_tflops
    )
    log.result(json.dumps(as_data(estimate), indent=2) if args.json else describe(estimate))
    if not estimate.fit.fits:
        raise CapacityError(verdict(estimate.fit))

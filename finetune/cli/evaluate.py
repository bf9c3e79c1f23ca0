"""`finetune evaluate RUN`: base against base + adapter on the same examples, with retention and contamination."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from finetune import log
from finetune.adapters.config_file import resolve_run
from finetune.cli.arguments import add_examples
from finetune.cli.generate import add_sampling, check_sampling
from finetune.errors import ConfigError
from finetune.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory, or an adapter directory")
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="data to score (default: the run's recipe; needed for an adapter alone)",
    )
    parser.add_argument(
        "--examples", type=int, metavar="N", help="test examples, stratified by answer (default: the recipe's, or all)"
    )
    parser.add_argument(
        "--retention", type=int, default=100, metavar="N", help="examples of each other shipped domain "
        "(default: 100; 0: none)",
    )  # fmt: skip
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="test examples to answer (default: 0)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="output directory (default: RUN/evaluation, with --recipe RUN/evaluation-RECIPE)",
    )
    add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_examples(
        parser,
        "finetune evaluate runs/first",
        "finetune evaluate runs/first --examples 200 --retention 0 --generate 50",
        "finetune evaluate my-adapter --recipe legal_20b --base openai/gpt-oss-20b",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate, and print the summary.

    Raises:
        ConfigError: an option out of its range, or no recipe to take examples from.
    """
    check_sampling(args)
    for name in ("examples", "retention", "generate"):
        value = getattr(args, name)
        least = 1 if name == "examples" else 0
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be {f'at least {least}' if least else '0 or more'}, not {value}")
    run_directory = resolve_run(args.run)[1]
    log.info(log.LOADING)
    from finetune.evaluate.inputs import EvaluationOptions
    from finetune.evaluate.run import evaluate
    from finetune.report.content import unescaped
    from finetune.report.markdown import describe_evaluation
    from finetune.results import to_json

    options = EvaluationOptions(
        recipe=_recipe(args.recipe) if args.recipe else None,
        recipe_name=Path(args.recipe).stem if args.recipe else None,
        examples=args.examples,
        retention=args.retention,
        generate=args.generate,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        base=args.base,
        revision=args.revision,
        device=args.device,
    )
    out, evaluation = evaluate(args.run, args.out, options)
    write_text(out / "README.md", describe_evaluation(evaluation))
    text = unescaped(describe_evaluation(evaluation, details=False))
    log.result(json.dumps(to_json(evaluation), indent=2) if args.json else text)
    log.info(f"figures: {out / 'summary.json'}, per example: {out / 'rows.jsonl'}, per label: {out / 'README.md'}")
    if run_directory is not None and out.resolve() == run_directory.resolve() / "evaluation":
        from finetune.report.html import write_html

        log.info(f"the run's page shows them too: {write_html(run_directory)}")


def _recipe(name: str):  # type: ignore[no-untyped-def]
    from finetune.config.compose import compose

    return compose(name).config

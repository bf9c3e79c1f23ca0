"""`finetune evaluate` from end to end: open, choose rows, measure, look for test rows seen in training, summarise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune import log
from finetune.adapters.config_file import resolve_run
from finetune.adapters.store import CONFIG, ROUTER_BIAS, WEIGHTS
from finetune.config.schema import RunConfig
from finetune.config.validate import load_run_config
from finetune.data.harmony.render import render_prompt
from finetune.data.sources import Record
from finetune.errors import ConfigError
from finetune.evaluate.contamination import find_contamination
from finetune.evaluate.evalset import Suite
from finetune.evaluate.generation import Sampling
from finetune.evaluate.inputs import EvaluationOptions as EvaluationOptions
from finetune.evaluate.inputs import read_evaluation_data
from finetune.evaluate.measure import MeasurementLog, answered_examples, measure
from finetune.evaluate.opening import LoadedModel, open_model
from finetune.evaluate.summary import summarise_answers, summarise_suite
from finetune.files import sha256_of, write_json


def evaluate(path: Path, out: Path | None, options: EvaluationOptions) -> tuple[Path, dict[str, Any]]:
    """Compare an adapter with its base.

    Args:
        path: a run directory, or an adapter directory.
        out: where figures go; rows measured there under the same settings are not measured again. None: `evaluation`
            in the run (`evaluation-RECIPE` for another recipe's rows), or beside the adapter.
        options: what to evaluate.

    Returns:
        The directory and the summary, which `summary.json` in it holds too.

    Raises:
        ConfigError: no recipe to take rows from, it has no test rows, or `out` holds another evaluation.
        FinetuneError: whatever is wrong with adapter, base or data.
    """
    directory, run = resolve_run(path)
    # The working directory changes while data is read.
    path, directory = path.resolve(), directory.resolve()
    run, out = run.resolve() if run else None, out.resolve() if out else None
    own = load_run_config(run / "config.yaml") if run else None
    config = _config(directory, own, options)
    data = read_evaluation_data(config, options, run, own)
    opened = open_model(path, base=options.base, revision=options.revision, device=options.device)
    sampling = Sampling(options.max_tokens, options.temperature, options.top_p, options.seed)
    _check_positions(opened, data.test, options)
    out = out or _default_directory(directory, run, options)
    row_log = MeasurementLog(out / "rows.jsonl", _belongs_to(opened, data.suites, sampling))
    measure(opened, data.suites, row_log, num_generated=options.generate, sampling=sampling)
    summary = {
        "adapter": str(opened.directory),
        "base": {"name": str(opened.base.checkpoint.directory), "identity": opened.base.identity},
        "confidence": config.evaluate.confidence,
        "notes": list(data.notes),
        "left_out": data.left_out,
        "suites": [summarise_suite(suite, row_log, config.evaluate.confidence) for suite in data.suites],
        "contamination": _contamination(data.test, data.train, row_log, config),
        "answers": summarise_answers(data.test, row_log, options.generate, data.train, config.evaluate.confidence)
        if options.generate
        else None,
    }
    write_json(out / "summary.json", summary)
    return out, summary


def _config(directory: Path, own: RunConfig | None, options: EvaluationOptions) -> RunConfig:
    """Whose rows to score: known before anything is read."""
    config = options.recipe or own
    if config is None:
        raise ConfigError(f"{directory} belongs to no run, so it has no test rows", fix="say whose with --recipe NAME")
    if not config.data.test:
        raise ConfigError("the recipe has no data.test", fix="add test sources, or name another recipe with --recipe")
    rows = options.rows if options.rows is not None else config.evaluate.test_examples
    return replace(config, evaluate=replace(config.evaluate, test_examples=rows))


def _default_directory(directory: Path, run: Path | None, options: EvaluationOptions) -> Path:
    """Beside the adapter or in the run; the run's report takes `evaluation` for the run's own test rows."""
    if run is None:
        return directory.with_name(f"{directory.name}-evaluation")
    return run / (f"evaluation-{options.recipe_name or 'other'}" if options.recipe else "evaluation")


def _check_positions(opened: LoadedModel, test: Suite, options: EvaluationOptions) -> None:
    """Answers that cannot be written are told before hours of scoring."""
    rows = answered_examples(test.rows, options.generate)
    if not rows:
        return
    longest = max(len(render_prompt(test.rows.records[row], test.data)) for row in rows)
    positions: int = opened.base.model.config.max_position_embeddings
    if longest + options.max_tokens > positions:
        raise ConfigError(
            f"--max-tokens {options.max_tokens:,}: the longest prompt has {longest:,} tokens, and the model has "
            f"{positions:,} positions",
            fix=f"ask for {positions - longest:,} or fewer" if longest < positions else "answer fewer or shorter rows",
        )


def _belongs_to(opened: LoadedModel, suites: Sequence[Suite], sampling: Sampling) -> dict[str, Any]:
    """What figures depend on: model, rows as tokens, and how answers are made."""
    adapter = hashlib.sha256()
    for name in (WEIGHTS, CONFIG, ROUTER_BIAS):  # alpha, and with it every figure, stands in the second
        if (opened.directory / name).is_file():
            adapter.update(f"{name} {sha256_of(opened.directory / name)} ".encode())
    rows = hashlib.sha256()
    for suite in suites:
        rows.update(f"{suite.name} {suite.rows.labels}".encode())
        for sample in suite.rows.samples:
            rows.update(sample.ids.tobytes() + sample.weights.tobytes())
    return {
        "adapter": adapter.hexdigest(),
        "base": opened.base.identity,
        "compute_dtype": str(opened.base.compute_dtype),
        "rows": rows.hexdigest(),
        "sampling": [sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed],
    }


def _contamination(
    test: Suite, train: Sequence[Record] | None, row_log: MeasurementLog, config: RunConfig
) -> dict[str, Any] | None:
    """Test rows seen in training, and the figures without them."""
    if train is None:
        return None
    records = [test.rows.records[row] for row in test.rows.first_examples]
    found = find_contamination(map(_text, train), [_text(record) for record in records])
    log.info(found.describe())
    seen = np.array(found.seen)
    result: dict[str, Any] = {
        "rows": len(seen),
        "seen": int(seen.sum()),
        "touched": sum(share > 0 for share in found.shares),
        "copies": found.copies,
        "too_short": found.too_short,
        "seen_ids": [record.id for record, is_seen in zip(records, seen, strict=True) if is_seen],
    }
    if 0 < seen.sum() < len(seen):
        result["without_seen"] = summarise_suite(
            test, row_log, config.evaluate.confidence, ~seen[test.rows.record_numbers]
        )
    return result


def _text(record: Record) -> str:
    conversation = record.conversation
    said = [message.content for message in conversation.messages if message.role in ("user", "assistant")]
    return "\n".join([*said, conversation.text or ""])

"""`finetune evaluate` from end to end: open, choose rows, measure, look for test rows seen in training, summarise."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.adapters.files import WEIGHTS
from finetune.adapters.locate import resolve_run
from finetune.config.schema import RunConfig
from finetune.config.validate import load_run_config
from finetune.console import say, warn
from finetune.data.dataset import load_split
from finetune.data.sources import Record
from finetune.errors import ConfigError
from finetune.evaluate.compare import measure
from finetune.evaluate.contamination import find_contamination
from finetune.evaluate.generation import Sampling
from finetune.evaluate.opening import OpenedModel, open_model
from finetune.evaluate.row_log import RowLog
from finetune.evaluate.summary import summarise_answers, summarise_suite
from finetune.evaluate.testset import Suite, choose_test_set, retention_suites


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What to evaluate; see `finetune evaluate --help`.

    Attributes:
        recipe: whose data; None: the run's.
        rows, retention, generate: how many rows of each kind; `rows` None: as the recipe says.
        max_tokens, temperature, top_p, seed: of generated answers; the seed also chooses rows.
        base, revision, device: see `open_model`.
    """

    recipe: RunConfig | None = None
    rows: int | None = None
    retention: int = 100
    generate: int = 0
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    base: str | None = None
    revision: str | None = None
    device: str | None = None


def evaluate(path: Path, out: Path | None, options: EvaluationOptions) -> tuple[Path, dict[str, Any]]:
    """Compare an adapter with its base.

    Args:
        path: a run directory, or an adapter directory.
        out: where figures go; rows measured there under the same settings are not measured again. None: `evaluation`
            in the run, or beside the adapter.
        options: what to evaluate.

    Returns:
        The directory and the summary, which `summary.json` in it holds too.

    Raises:
        ConfigError: no recipe to take rows from, it has no test rows, or `out` holds another evaluation.
        FinetuneError: whatever is wrong with adapter, base or data.
    """
    path, out = path.resolve(), out.resolve() if out else None  # the working directory may change below
    config = _config(path, options)
    opened = open_model(path, base=options.base, revision=options.revision, device=options.device)
    if opened.run is not None:
        _work_where_the_run_did(opened.run)
    test_split = load_split(config.data, "test")
    test = Suite("test", choose_test_set(test_split, config), config.data)
    suites = [test]
    if options.retention:
        suites += retention_suites(config.data, options.retention, options.seed)
    sampling = Sampling(options.max_tokens, options.temperature, options.top_p, options.seed)
    out = out or (
        opened.run / "evaluation" if opened.run else opened.directory.with_name(f"{opened.directory.name}-evaluation")
    )
    log = RowLog(out / "rows.jsonl", _belongs_to(opened, suites, sampling))
    measure(opened, suites, log, num_generated=options.generate, sampling=sampling)
    train = load_split(config.data, "train").records if config.data.train else ()
    summary = {
        "adapter": str(opened.directory),
        "base": {"name": str(opened.base.checkpoint.directory), "identity": opened.base.identity},
        "confidence": config.evaluate.confidence,
        "suites": [summarise_suite(suite, log, config.evaluate.confidence) for suite in suites],
        "contamination": _contamination(test, train, log, config),
        "answers": summarise_answers(test, log, options.generate, train) if options.generate else None,
    }
    staging = out / "summary.json.partial"
    staging.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(staging, out / "summary.json")
    return out, summary


def _config(path: Path, options: EvaluationOptions) -> RunConfig:
    """Whose rows to score: known before a model is loaded."""
    directory, run = resolve_run(path)
    config = options.recipe or (load_run_config(run / "config.yaml") if run else None)
    if config is None:
        raise ConfigError(f"{directory} belongs to no run, so it has no test rows", fix="say whose with --recipe NAME")
    if not config.data.test:
        raise ConfigError("the recipe has no data.test", fix="add test sources, or name another recipe with --recipe")
    rows = options.rows if options.rows is not None else config.evaluate.test_rows
    return replace(config, seed=options.seed, evaluate=replace(config.evaluate, test_rows=rows))


def _work_where_the_run_did(run: Path) -> None:
    """Relative paths of a recipe start where the run was started."""
    try:
        origin = json.loads((run / "manifest.json").read_text()).get("working_directory")
    except (OSError, ValueError):
        return
    if origin and Path(origin) != Path.cwd() and Path(origin).is_dir():
        warn(f"reading the recipe's data from {origin}, where the run was started")
        os.chdir(origin)


def _belongs_to(opened: OpenedModel, suites: Sequence[Suite], sampling: Sampling) -> dict[str, Any]:
    """What figures depend on: model, rows as tokens, and how answers are made."""
    with (opened.directory / WEIGHTS).open("rb") as file:
        adapter = hashlib.file_digest(file, "sha256").hexdigest()
    rows = hashlib.sha256()
    for suite in suites:
        rows.update(f"{suite.name} {suite.rows.labels}".encode())
        for sample in suite.rows.samples:
            rows.update(sample.ids.tobytes() + sample.weights.tobytes())
    return {
        "adapter": adapter,
        "base": opened.base.identity,
        "compute_dtype": str(opened.base.compute_dtype),
        "rows": rows.hexdigest(),
        "sampling": [sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed],
    }


def _contamination(test: Suite, train: Sequence[Record], log: RowLog, config: RunConfig) -> dict[str, Any] | None:
    """Test rows seen in training, and the figures without them."""
    if not train:
        return None
    found = find_contamination(map(_text, train), [_text(record) for record in test.rows.records])
    say(found.describe())
    seen = np.array(found.seen)
    result: dict[str, Any] = {
        "rows": len(seen),
        "seen": int(seen.sum()),
        "touched": sum(share > 0 for share in found.shares),
        "copies": found.copies,
        "too_short": found.too_short,
        "seen_ids": [record.id for record, is_seen in zip(test.rows.records, seen, strict=True) if is_seen],
    }
    if 0 < seen.sum() < len(seen):
        result["without_seen"] = summarise_suite(test, log, config.evaluate.confidence, ~seen)
    return result


def _text(record: Record) -> str:
    conversation = record.conversation
    said = [message.content for message in conversation.messages if message.role in ("user", "assistant")]
    return "\n".join([*said, conversation.text or ""])

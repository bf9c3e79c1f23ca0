"""`finetune evaluate` end to end: open the model, choose examples, measure, find contamination, summarise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune import log
from finetune.adapters.config_file import CONFIG, resolve_run
from finetune.adapters.provenance import ROUTER_BIAS
from finetune.adapters.store import WEIGHTS
from finetune.config.schema import RunConfig
from finetune.config.validate import load_run_config
from finetune.data.harmony.render import render_prompt
from finetune.data.sources import Record
from finetune.errors import ConfigError
from finetune.evaluate.contamination import find_contamination
from finetune.evaluate.evalset import EvalSet
from finetune.evaluate.generation import Sampling
from finetune.evaluate.inputs import EvaluationData, EvaluationOptions, read_evaluation_data
from finetune.evaluate.measure import MeasurementLog, measure
from finetune.evaluate.opening import LoadedModel, open_model
from finetune.evaluate.summary import summarise_answers, summarise_log
from finetune.files import JsonObject, only_writer, sha256_of
from finetune.results import BaseName, ContaminationFigures, Evaluation, write_evaluation


def evaluate(path: Path, out: Path | None, options: EvaluationOptions) -> tuple[Path, Evaluation]:
    """Compare an adapter with its base.

    Args:
        path: a run directory, or an adapter directory.
        out: where results go; examples measured there under the same settings are not measured again. None:
            `evaluation` in the run (`evaluation-RECIPE` for another recipe's examples), or beside the adapter.
        options: what to evaluate.

    Returns:
        The directory and the results, which are in its `summary.json` too.

    Raises:
        ConfigError: no recipe to take examples from, it has no test data, or `out` holds another evaluation or is being
            written by another process.
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
    with only_writer(out):
        return out, _measured(config, options, data, opened, sampling, out)


def _measured(
    config: RunConfig,
    options: EvaluationOptions,
    data: EvaluationData,
    opened: LoadedModel,
    sampling: Sampling,
    out: Path,
) -> Evaluation:
    """Measure what `out` does not have yet, and write its summary."""
    measured = MeasurementLog(out / "rows.jsonl", _belongs_to(opened, data.evalsets, sampling))
    measure(opened, data.evalsets, measured, num_generated=options.generate, sampling=sampling)
    confidence = config.evaluate.confidence
    evaluation = Evaluation(
        adapter=str(opened.directory),
        base=BaseName(str(opened.base.checkpoint.directory), opened.base.identity),
        confidence=confidence,
        notes=list(data.notes),
        left_out=data.left_out,
        suites=[summarise_log(evalset, measured, confidence) for evalset in data.evalsets],
        contamination=_contamination(data.test, data.train, measured, confidence),
        answers=summarise_answers(data.test, measured, options.generate, data.train, confidence)
        if options.generate
        else None,
    )
    write_evaluation(out / "summary.json", evaluation)
    return evaluation


def _config(directory: Path, own: RunConfig | None, options: EvaluationOptions) -> RunConfig:
    """The recipe whose examples are scored, checked before anything is read."""
    config = options.recipe or own
    if config is None:
        raise ConfigError(
            f"{directory} belongs to no run, so it has no test data", fix="name a recipe with --recipe NAME"
        )
    if not config.data.test:
        raise ConfigError("the recipe has no data.test", fix="add test sources, or name another recipe with --recipe")
    count = options.examples if options.examples is not None else config.evaluate.test_examples
    return replace(config, evaluate=replace(config.evaluate, test_examples=count))


def _default_directory(directory: Path, run: Path | None, options: EvaluationOptions) -> Path:
    """Beside the adapter or in the run; the run's report shows `evaluation`, which is of the run's own test data."""
    if run is None:
        return directory.with_name(f"{directory.name}-evaluation")
    return run / (f"evaluation-{options.recipe_name or 'other'}" if options.recipe else "evaluation")


def _check_positions(opened: LoadedModel, test: EvalSet, options: EvaluationOptions) -> None:
    """Refuse answers that do not fit into the model's positions before hours of scoring."""
    numbers = test.answered_examples(options.generate)
    if not numbers:
        return
    longest = max(len(render_prompt(test.records[n], test.data)) for n in numbers)
    positions: int = opened.base.model.config.max_position_embeddings
    if longest + options.max_tokens > positions:
        raise ConfigError(
            f"--max-tokens {options.max_tokens:,}: the longest prompt has {longest:,} tokens, and the model has "
            f"{positions:,} positions",
            fix=f"ask for {positions - longest:,} or fewer"
            if longest < positions
            else "answer fewer or shorter examples",
        )


def _belongs_to(opened: LoadedModel, evalsets: Sequence[EvalSet], sampling: Sampling) -> JsonObject:
    """Identify the inputs of the figures as JSON data: model, examples as tokens, and sampling."""
    adapter = hashlib.sha256()
    for name in (WEIGHTS, CONFIG, ROUTER_BIAS):  # alpha, on which every figure depends, is in the second
        if (opened.directory / name).is_file():
            adapter.update(f"{name} {sha256_of(opened.directory / name)} ".encode())
    examples = hashlib.sha256()
    for evalset in evalsets:
        examples.update(f"{evalset.name} {evalset.labels}".encode())
        for example in evalset.examples:
            examples.update(example.ids.tobytes() + example.weights.tobytes())
    return {
        "adapter": adapter.hexdigest(),
        "base": opened.base.identity,
        "compute_dtype": str(opened.base.compute_dtype),
        "rows": examples.hexdigest(),
        "sampling": [sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed],
    }


def _contamination(
    test: EvalSet, train: Sequence[Record] | None, measured: MeasurementLog, confidence: float
) -> ContaminationFigures | None:
    """Test records seen in training, and the figures without them."""
    if train is None:
        return None
    records = [test.records[n] for n in test.first_examples]
    found = find_contamination(map(_text, train), [_text(record) for record in records])
    log.info(found.describe())
    seen = np.array(found.seen)
    keep = ~seen[test.record_numbers]
    return ContaminationFigures(
        rows=len(seen),
        seen=int(seen.sum()),
        touched=sum(share > 0 for share in found.shares),
        copies=found.copies,
        too_short=found.too_short,
        seen_ids=[record.id for record, is_seen in zip(records, seen, strict=True) if is_seen],
        without_seen=summarise_log(test, measured, confidence, keep) if 0 < seen.sum() < len(seen) else None,
    )


def _text(record: Record) -> str:
    conversation = record.conversation
    texts = [message.content for message in conversation.messages if message.role in ("user", "assistant")]
    return "\n".join([*texts, conversation.text or ""])

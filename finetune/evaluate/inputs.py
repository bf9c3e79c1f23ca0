"""Inputs of `finetune evaluate`: options, the evaluation sets to score, and the records that were trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import log
from finetune.config.schema import DataConfig, RunConfig
from finetune.data.bad_records import count_kinds
from finetune.data.dataset import Split, load_split, report_split
from finetune.data.sources import Record
from finetune.errors import FinetuneError, InputError
from finetune.evaluate.evalset import EvalSet, choose_test_set, retention_sets
from finetune.manifest import read_manifest


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of `finetune evaluate`; see its `--help`.

    Attributes:
        recipe: whose data to score; None: the run's.
        recipe_name: names the directory of the results.
        examples, retention, generate: number of examples of each kind; `examples` None: as the recipe says.
        max_tokens, temperature, top_p, seed: of generated answers.
        base, revision, device: see `open_model`.
    """

    recipe: RunConfig | None = None
    recipe_name: str | None = None
    examples: int | None = None
    retention: int = 100
    generate: int = 0
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    base: str | None = None
    revision: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class EvaluationData:
    """Data of an evaluation.

    Attributes:
        evalsets: what is scored, the test set first.
        train: the records that the adapter was trained on; None if they are not known or cannot be read.
        left_out: test records that were `skipped` or `dropped`, and `truncated` ones.
        notes: what to know about all this, in sentences.
    """

    evalsets: tuple[EvalSet, ...]
    train: Sequence[Record] | None
    left_out: dict[str, int]
    notes: tuple[str, ...]

    @property
    def test(self) -> EvalSet:
        """The recipe's test set."""
        return self.evalsets[0]


def read_evaluation_data(
    config: RunConfig, options: EvaluationOptions, run: Path | None, own: RunConfig | None
) -> EvaluationData:
    """Read all records, so that errors in them are reported before anything is measured.

    The recipe defines what is scored; the run defines what was seen in training, whatever recipe is scored. Relative
    paths of a run's recipe are relative to the directory it was started in, those of a recipe given here to this one.

    Args:
        config: the recipe that is scored, with the wanted number of test examples.
        options: number of examples of other kinds.
        run, own: the run that the adapter belongs to and its recipe; None for an adapter alone.

    Raises:
        ConfigError, InputError: see `load_split` and `choose_test_set`; or answers are to be generated to plain text.
    """
    is_own = options.recipe is None
    with _working_directory_of(run if is_own else None):
        split = load_split(config.data, "test")
        report_split(split)
        beside, problem = _training_split(config.data)
        test = choose_test_set(split, config, beside.stats.answers if beside else {})
    evalsets = [test]
    notes = [*_left_out_notes(split, config.data), *test.notes, *_repeated_note(test)]
    trained, trained_data = beside, config.data
    if own is None:
        notes.append("the adapter belongs to no run: what it was trained on is taken from the recipe")
    elif not is_own:
        notes.append("another recipe than the run's is scored; what was trained on is the run's own data")
    with _working_directory_of(run):
        if own is not None and not is_own:
            trained_data, (trained, problem) = own.data, _training_split(own.data)
        if options.retention:
            scores_labels = config.evaluate.labels != "never"
            evalsets += retention_sets(config.data, trained_data.train, options.retention, scores_labels=scores_labels)
    if trained is None:
        notes.append(f"contamination and copying are not checked: {problem}")
        log.warning(notes[-1])
    if options.generate and not test.answered_examples(options.generate):
        raise InputError("--generate: all test records are plain text, which has no prompt to answer", fix="omit it")
    left_out = {
        "skipped": len(split.stats.bad_records),
        "dropped": len(split.stats.dropped),
        "truncated": split.stats.num_truncated,
    }
    return EvaluationData(tuple(evalsets), trained.records if trained else None, left_out, tuple(notes))


def _training_split(data: DataConfig) -> tuple[Split | None, str]:
    """The training split; or None and why not: an evaluation without it is worth more than none."""
    if not data.train:
        return None, "the recipe has no data.train"
    try:
        return load_split(data, "train"), ""
    except FinetuneError as error:
        return None, f"the training data cannot be read ({error.what})"


def _left_out_notes(split: Split, data: DataConfig) -> list[str]:
    notes = []
    for kind, records in (("skipped", split.stats.bad_records), ("dropped", split.stats.dropped)):
        if records:
            kinds = count_kinds(records)
            notes.append(f"{len(records):,} records of data.test were {kind} and are in no figure ({kinds})")
    if split.stats.num_truncated:
        notes.append(
            f"{split.stats.num_truncated:,} records of data.test lost context to fit data.max_length "
            f"({data.max_length:,} tokens): the loss is of what was left, labels and answers use the whole prompt"
        )
    return notes


def _repeated_note(test: EvalSet) -> list[str]:
    num_examples, num_records = len(test.records), len(test.first_examples)
    if num_examples == num_records:
        return []
    return [
        f"the {num_examples:,} test examples are of {num_records:,} records: a label is scored and an answer generated "
        "once per record, and intervals treat records, not examples, as drawn by chance"
    ]


@contextlib.contextmanager
def _working_directory_of(run: Path | None) -> Iterator[None]:
    """Change into the directory that a run was started in: relative paths of its recipe start there."""
    origin = None
    if run is not None:
        origin = read_manifest(run).get("working_directory")
    if not origin or Path(origin) == Path.cwd() or not Path(origin).is_dir():
        yield
        return
    log.warning(f"reading the run's data from {origin}, where it was started")
    with contextlib.chdir(origin):
        yield

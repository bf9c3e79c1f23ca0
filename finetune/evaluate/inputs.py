"""What `finetune evaluate` reads before it measures: test rows, rows of other domains, and what was trained on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import log
from finetune.config.schema import DataConfig, RunConfig
from finetune.data.dataset import Split, count_kinds, describe, load_split
from finetune.data.sources import Record
from finetune.errors import FinetuneError, InputError
from finetune.evaluate.evalset import Suite, choose_test_set, retention_sets
from finetune.evaluate.measure import answered_examples


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What to evaluate; see `finetune evaluate --help`.

    Attributes:
        recipe: whose data; None: the run's.
        recipe_name: what to call it.
        rows, retention, generate: how many rows of each kind; `rows` None: as the recipe says.
        max_tokens, temperature, top_p, seed: of generated answers.
        base, revision, device: see `open_model`.
    """

    recipe: RunConfig | None = None
    recipe_name: str | None = None
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


@dataclass(frozen=True)
class EvaluationData:
    """What is scored, and what it is held against.

    Attributes:
        suites: what is scored, the test rows first.
        train: the records that the adapter was trained on; None if they are not known or cannot be read.
        left_out: test rows that were `skipped` or `dropped`, and `truncated` ones.
        notes: what a person should know of all this, a sentence each.
    """

    suites: tuple[Suite, ...]
    train: Sequence[Record] | None
    left_out: dict[str, int]
    notes: tuple[str, ...]

    @property
    def test(self) -> Suite:
        """The recipe's test rows."""
        return self.suites[0]


def read_evaluation_data(
    config: RunConfig, options: EvaluationOptions, run: Path | None, own: RunConfig | None
) -> EvaluationData:
    """Read all rows, so that what is wrong with them is said before anything is measured.

    The recipe says what is scored; what was seen in training is the run's to say, whatever recipe is scored. Relative
    paths start where the run was started, but those of a recipe given here, where this command was.

    Args:
        config: the recipe that is scored, with as many test rows as are wanted.
        options: how many rows of other kinds.
        run, own: the run that the adapter belongs to and its recipe; None for an adapter alone.

    Raises:
        ConfigError, InputError: see `load_split` and `choose_test_set`; or answers are wanted of plain text.
    """
    is_own = options.recipe is None
    with _working_where_started(run if is_own else None):
        split = load_split(config.data, "test")
        log.info(describe(split))
        beside, cannot = _training_split(config.data)
        rows = choose_test_set(split, config, beside.stats.answers if beside else {})
    suites = [Suite("test", rows, config.data)]
    notes = [*_left_out_notes(split, config.data), *rows.notes, *_repeated_note(suites[0])]
    trained, was_trained_on = beside, config.data
    if own is None:
        notes.append("the adapter belongs to no run: what it was trained on is taken from the recipe")
    elif not is_own:
        notes.append("another recipe than the run's is scored; what was trained on is the run's own data")
    with _working_where_started(run):
        if own is not None and not is_own:
            was_trained_on, (trained, cannot) = own.data, _training_split(own.data)
        if options.retention:
            wanted = config.evaluate.labels != "never"
            suites += retention_sets(config.data, was_trained_on.train, options.retention, scores_labels=wanted)
    if trained is None:
        notes.append(f"contamination and copying are not checked: {cannot}")
        log.warning(notes[-1])
    _check_answerable(suites[0], options.generate)
    left_out = {
        "skipped": len(split.stats.bad_records),
        "dropped": len(split.stats.dropped),
        "truncated": split.stats.num_truncated,
    }
    return EvaluationData(tuple(suites), trained.records if trained else None, left_out, tuple(notes))


def _training_split(data: DataConfig) -> tuple[Split | None, str]:
    """The training rows; or None and why not: an evaluation without them is worth more than none."""
    if not data.train:
        return None, "the recipe has no data.train"
    try:
        return load_split(data, "train"), ""
    except FinetuneError as error:
        return None, f"the training data cannot be read ({error.what})"


def _left_out_notes(split: Split, data: DataConfig) -> list[str]:
    notes = []
    for kind, rows in (("skipped", split.stats.bad_records), ("dropped", split.stats.dropped)):
        if rows:
            notes.append(f"{len(rows):,} rows of data.test were {kind} and are in no figure ({count_kinds(rows)})")
    if split.stats.num_truncated:
        notes.append(
            f"{split.stats.num_truncated:,} rows of data.test lost context to fit data.max_length ({data.max_length:,} "
            "tokens): the loss sees what was left, labels and answers the whole prompt"
        )
    return notes


def _repeated_note(test: Suite) -> list[str]:
    num_rows, num_records = len(test.rows.records), len(test.rows.first_examples)
    if num_rows == num_records:
        return []
    return [
        f"the {num_rows:,} test rows are of {num_records:,} records: a label is scored and an answer generated once a "
        "record, and intervals take records, not rows, as drawn by chance"
    ]


def _check_answerable(test: Suite, count: int) -> None:
    if count and not answered_examples(test.rows, count):
        raise InputError("--generate: all test rows are plain text, which has no prompt to answer", fix="leave it out")


@contextlib.contextmanager
def _working_where_started(run: Path | None) -> Iterator[None]:
    """Relative paths of a run's recipe start where the run was started."""
    origin = None
    if run is not None:
        with contextlib.suppress(OSError, ValueError):
            origin = json.loads((run / "manifest.json").read_text()).get("working_directory")
    if not origin or Path(origin) == Path.cwd() or not Path(origin).is_dir():
        yield
        return
    log.warning(f"reading the run's data from {origin}, where it was started")
    with contextlib.chdir(origin):
        yield

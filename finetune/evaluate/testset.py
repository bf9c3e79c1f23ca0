"""Which rows are scored: the recipe's test rows, and others that show what was forgotten.

`TestSet` is what is scored before and after; a `Suite` gives it a name and the settings its prompts are rendered with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.config.locate import SHIPPED_PREFIX, matching_files, resolve_data_path
from finetune.config.schema import DataConfig, RunConfig, SourceConfig, ValidationSplitConfig
from finetune.console import warn
from finetune.data.conversation import Conversation
from finetune.data.dataset import Split, load_split
from finetune.data.render import Sample, render_samples
from finetune.data.sources import Record
from finetune.errors import ConfigError
from finetune.evaluate.labels import label_set, stratified_subset

# Domain: its shipped file. A run on one of them shows what it forgot on the others.
SHIPPED = {
    "legal": "legal/cuad_clause_type.jsonl.gz",
    "medical": "medical/pubmedqa_labeled.jsonl.gz",
    "creative": "creative/fiction_continuation.jsonl.gz",
}
_PLAIN_TEXT = "plain text"


@dataclass(frozen=True)
class TestSet:
    """The rows scored before and after.

    Attributes:
        records, samples: the same rows, as read and as tokens.
        labels: candidate answers, or None when labels are not scored.
    """

    records: tuple[Record, ...]
    samples: tuple[Sample, ...]
    labels: tuple[str, ...] | None


def choose_test_set(split: Split, config: RunConfig) -> TestSet:
    """Pick the recipe's test rows, stratified by answer; labels come from the whole split.

    Raises:
        ConfigError: `evaluate.labels=always`, but the split has records without an answer, or too many answers.
    """
    labels = label_set(split.records) if config.evaluate.labels != "never" else None
    if config.evaluate.labels == "always" and labels is None:
        raise ConfigError(
            "evaluate.labels is always, but the test records do not make a label set",
            why="every record needs an `answer`, and there may be 2 to 64 different ones",
            fix="set evaluate.labels=never, or give the records answers",
        )
    chosen = stratified_subset(split.records, config.evaluate.test_rows, config.seed)
    return TestSet(tuple(split.records[n] for n in chosen), tuple(split.samples[n] for n in chosen), labels)


@dataclass(frozen=True)
class Suite:
    """Rows that are scored together.

    Attributes:
        name: `test`, or a domain of the retention suites.
        rows: what is scored.
        data: how its prompts are rendered.
    """

    name: str
    rows: TestSet
    data: DataConfig


def retention_suites(config: DataConfig, rows: int, seed: int) -> list[Suite]:
    """Rows of the shipped domains that the recipe does not train on, and their texts as plain text.

    Args:
        config: the recipe's data; prompts are rendered as there.
        rows: rows of each suite.
        seed: of the choice.

    Returns:
        One suite a domain, and one of plain text; a domain that is not installed is left out, and that is said.
    """
    trained = {file.resolve() for source in config.train.values() for file in _files(source)}
    suites = []
    for domain, name in SHIPPED.items():
        path = resolve_data_path(SHIPPED_PREFIX + name)
        if path.resolve() in trained:
            continue
        if not path.is_file():
            warn(f"retention: {domain} is not installed; `finetune data prepare {domain}` builds it")
            continue
        source = SourceConfig(path=str(path), where={"split": "test"})
        data = replace(
            config,
            train={},
            validation={},
            validation_split=ValidationSplitConfig(),
            test={domain: source},
            max_length=max(4096, config.max_length),
        )
        split = load_split(data, "test")
        chosen = stratified_subset(split.records, rows, seed)
        labels = label_set(split.records)
        suites.append(Suite(domain, _take(split.records, split.samples, chosen, labels), data))
    if suites:
        suites.append(_plain_text(suites, rows, config))
    return suites


def _plain_text(suites: Sequence[Suite], rows: int, config: DataConfig) -> Suite:
    """The other suites' texts without any harmony around them, taken in turn."""
    each = max(1, rows // len(suites))
    records = [
        replace(record, conversation=Conversation((), text=_text_of(record), form="text"), answer=None)
        for suite in suites
        for record in suite.rows.records[:each]
    ]
    data = replace(config, max_length=max(4096, config.max_length))
    samples = [render_samples(record, data)[0] for record in records]
    return Suite(_PLAIN_TEXT, TestSet(tuple(records), tuple(samples), None), data)


def _text_of(record: Record) -> str:
    return "\n\n".join(message.content for message in record.messages if message.role in ("user", "assistant"))


def _take(
    records: Sequence[Record], samples: Sequence[Sample], chosen: Sequence[int], labels: tuple[str, ...] | None
) -> TestSet:
    return TestSet(tuple(records[n] for n in chosen), tuple(samples[n] for n in chosen), labels)


def _files(source: SourceConfig) -> list[Path]:
    return [] if source.path.startswith("hub://") else matching_files(source.path)

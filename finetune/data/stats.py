"""Count a recipe's data: records, tokens, lengths, packing, records left out, and duplicates."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.config.schema import RunConfig
from finetune.data.bad_records import fix_for
from finetune.data.control_text import control_text_lines
from finetune.data.dataset import Split, load_split
from finetune.data.duplicates import Overlap, Text, find_duplicates, text_of
from finetune.data.example_table import RecordTable, example_lengths
from finetune.data.harmony.encode import HEADER, Channel
from finetune.data.packing import Mixture, pack, packing_efficiency
from finetune.data.pair_stats import PairStats, pair_lines, pair_stats
from finetune.data.preferences import PREFERENCE_KEYS
from finetune.data.sources import BadRecord, split_names
from finetune.files import JsonObject

_BINS = 12
_BAR = 40
_PLACES_SHOWN = 5


@dataclass(frozen=True)
class LengthStats:
    """Quantiles of the examples' lengths in tokens.

    Attributes:
        shortest, median, mean, percentile_95, longest: in tokens.
        histogram: (low, high, count) of equal bins; a bin counts lengths above low, up to high.
    """

    shortest: int
    median: float
    mean: float
    percentile_95: float
    longest: int
    histogram: tuple[tuple[int, int, int], ...]

    def as_json(self) -> JsonObject:
        """As plain data."""
        bins = [{"from": low, "to": high, "samples": count} for low, high, count in self.histogram]
        return {
            "shortest": self.shortest,
            "median": self.median,
            "mean": self.mean,
            "95_percent": self.percentile_95,
            "longest": self.longest,
            "histogram": bins,
        }


@dataclass(frozen=True)
class PackingStats:
    """The sequences of the first epoch, as a run would pack them.

    Attributes:
        max_length: capacity of a sequence in tokens.
        examples: examples that the epoch takes.
        examples_by_source: of each source.
        sequences: sequences that they fill.
        efficiency: share of the sequences' capacity that is filled with tokens.
    """

    max_length: int
    examples: int
    examples_by_source: dict[str, int]
    sequences: int
    efficiency: float

    def as_json(self) -> JsonObject:
        """As plain data."""
        return {
            "max_length": self.max_length,
            "samples": self.examples,
            "samples_by_source": self.examples_by_source,
            "rows": self.sequences,
            "efficiency": self.efficiency,
        }


@dataclass(frozen=True)
class SplitFigures:
    """Counts of one split.

    Attributes:
        split: the split; its `stats` are part of the figures.
        trained, context: tokens with and without a loss weight, by channel.
        lengths: None for a split without examples.
        packing: the first epoch's sequences.
        num_without_thinking: examples with assistant messages that are untrained because their thinking was dropped.
        pairs: of preference records; lengths and packing are then those of whole records, each prompt once.
    """

    split: Split
    trained: dict[str, int]
    context: dict[str, int]
    lengths: LengthStats | None
    packing: PackingStats
    num_without_thinking: int
    pairs: PairStats | None = None

    def as_json(self) -> JsonObject:
        """As plain data."""
        stats = self.split.stats
        return {
            "records": stats.num_records,
            "samples": len(self.split.examples),
            "tokens": stats.num_tokens,
            "trained": self.trained,
            "context": self.context,
            "lengths": self.lengths.as_json() if self.lengths else {},
            "packing": self.packing.as_json(),
            "sources": stats.source_sizes,
            "forms": stats.forms,
            "unused_keys": stats.unused_keys,
            "truncated": stats.num_truncated,
            "dropped": _left_out_json(stats.dropped),
            "skipped": _left_out_json(stats.bad_records),
            "control_text": {kind: dataclasses.asdict(found) for kind, found in stats.control_text.items()},
            "thinking_moved_out_of_tags": stats.num_moved_thinking,
            "samples_with_answers_untrained_for_lost_thinking": self.num_without_thinking,
            "fingerprint": stats.fingerprint,
        } | ({"preferences": self.pairs.as_json()} if self.pairs else {})


@dataclass(frozen=True)
class DataFigures:
    """The answer of `finetune data stats`.

    Attributes:
        splits: figures by split.
        duplicates: by pair of splits, as in `find_duplicates`. None: not compared.
    """

    splits: dict[str, SplitFigures]
    duplicates: dict[str, Overlap] | None

    def as_json(self) -> JsonObject:
        """As plain data; `duplicates` only if they were looked for."""
        splits = {name: figures.as_json() for name, figures in self.splits.items()}
        if self.duplicates is None:
            return {"splits": splits}
        return {"splits": splits, "duplicates": {name: _overlap_json(found) for name, found in self.duplicates.items()}}


def collect(config: RunConfig, *, duplicates: bool = True) -> DataFigures:
    """Read every split and count.

    Records that cannot be used are counted here even where the recipe would stop at them.

    Args:
        config: the whole run.
        duplicates: also look for records that repeat each other, which keeps every record's text in memory and about
            2 KB more per record.

    Raises:
        FinetuneError: see `load_split`.
    """
    splits: dict[str, Split] = {name: load_split(config.data, name, check=False) for name in split_names(config.data)}
    figures = {name: _figures(split, config) for name, split in splits.items()}
    found = find_duplicates({name: _texts(split) for name, split in splits.items()}) if duplicates else None
    return DataFigures(figures, found)


def _figures(split: Split, config: RunConfig) -> SplitFigures:
    trained, context = np.zeros(HEADER, dtype=np.int64), np.zeros(HEADER, dtype=np.int64)
    without_thinking = 0
    for example in split.examples:
        channels = (example.channels % HEADER).astype(np.int64)
        weighted = example.weights > 0
        trained += np.bincount(channels[weighted], minlength=HEADER)
        context += np.bincount(channels[~weighted], minlength=HEADER)
        without_thinking += example.num_without_thinking > 0
    lengths, sizes, pairs = example_lengths(split.examples), split.stats.source_sizes, None
    if split.stats.forms.keys() & PREFERENCE_KEYS.keys():
        starts = split.first_examples()
        pairs, lengths = pair_stats(split.examples, starts, split.stats)
        ends = np.searchsorted(starts, np.cumsum([0, *sizes.values()]))
        sizes = dict(zip(sizes, np.diff(ends).tolist(), strict=True))
    return SplitFigures(
        split,
        _by_channel(trained),
        _by_channel(context),
        _length_stats(lengths) if lengths else None,
        _packing_stats(split.name, sizes, lengths, config),
        without_thinking,
        pairs,
    )


def _by_channel(counts: NDArray[np.int64]) -> dict[str, int]:
    return {channel.name.lower(): int(counts[channel]) for channel in Channel if counts[channel]}


def _length_stats(lengths: Sequence[int]) -> LengthStats:
    values = np.array(lengths)
    step = _round_step((values.max() - values.min()) / _BINS)
    edges = np.arange((values.min() - 1) // step * step, values.max() + step, step)
    counts, _ = np.histogram(values - 0.5, edges)
    return LengthStats(
        shortest=int(values.min()),
        median=float(np.median(values)),
        mean=round(float(values.mean()), 1),
        percentile_95=float(np.percentile(values, 95)),
        longest=int(values.max()),
        histogram=tuple(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)),
    )


def _round_step(least: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if step >= least:
                return step
        power *= 10


def _packing_stats(split: str, source_sizes: dict[str, int], lengths: Sequence[int], config: RunConfig) -> PackingStats:
    data = config.data
    taken = list(range(len(lengths)))
    if taken and split == "train":
        taken = Mixture(source_sizes, data.train, data.mix_temperature, config.seed).examples(0).tolist()
    sizes = [lengths[index] for index in taken]
    sequences = [[place] for place in range(len(taken))]
    if data.pack:
        sequences = pack(sizes, data.max_length, np.random.default_rng([config.seed, 0]))
    ends = np.cumsum([0, *source_sizes.values()])
    per_source = np.histogram(np.array(taken), ends)[0].tolist() if taken else [0] * len(source_sizes)
    efficiency = round(packing_efficiency(sizes, sequences, data.max_length), 5)
    by_source = dict(zip(source_sizes, per_source, strict=True))
    return PackingStats(data.max_length, len(taken), by_source, len(sequences), efficiency)


def _texts(split: Split) -> list[Text]:
    records = split.records
    indices = records.first_examples().tolist() if isinstance(records, RecordTable) else range(len(records))
    return [text_of(records[index].where, records[index].conversation) for index in indices]


def _places(bad_records: Sequence[BadRecord]) -> dict[str, list[str]]:
    """Places and reasons by kind, the most frequent kind first."""
    kinds = Counter(bad.kind for bad in bad_records).most_common()
    return {kind: [f"{bad.where}: {bad.reason}" for bad in bad_records if bad.kind == kind] for kind, _ in kinds}


def _left_out_json(bad_records: Sequence[BadRecord]) -> JsonObject:
    places = _places(bad_records)
    return {"rows": len(bad_records), "kinds": {kind: len(found) for kind, found in places.items()}, "places": places}


def _overlap_json(overlap: Overlap) -> JsonObject:
    counts = dataclasses.asdict(overlap)
    return {"rows": counts.pop("num_records"), **counts}


def describe_stats(figures: DataFigures) -> Iterator[str]:
    """The result of `collect` as lines of text."""
    for name, split in figures.splits.items():
        yield from _split_lines(name, split)
        yield ""
    if figures.duplicates is not None:
        yield from _duplicate_lines(figures.duplicates)


def _split_lines(name: str, figures: SplitFigures) -> Iterator[str]:
    stats, packing = figures.split.stats, figures.packing
    num_examples = len(figures.split.examples)
    yield f"{name}: {stats.num_records:,} records, {num_examples:,} examples, {stats.num_tokens:,} tokens"
    if not num_examples:
        yield "  nothing to use: a run stops here"
    yield f"  form: {', '.join(f'{form} {count:,}' for form, count in stats.forms.items())}"
    if stats.unused_keys:
        yield f"  keys not used: {', '.join(f'{key} {count:,}' for key, count in stats.unused_keys.items())}"
    for title, counts in (("trained", figures.trained), ("context", figures.context)):
        parts = ", ".join(f"{channel} {count:,}" for channel, count in counts.items()) or "nothing"
        yield f"  {title}: {parts} ({sum(counts.values()) / max(1, stats.num_tokens):.1%} of all tokens)"
    if len(stats.source_sizes) > 1:
        for source, size in stats.source_sizes.items():
            yield f"  source {source}: {size:,} examples, {packing.examples_by_source[source]:,} in the first epoch"
    unit = "records" if figures.pairs else "examples"
    if figures.pairs:
        yield from pair_lines(figures.pairs)
    yield (
        f"  packing: {packing.examples:,} {unit} into {packing.sequences:,} sequences of {packing.max_length:,} "
        f"tokens, {packing.efficiency:.2%} filled"
    )
    if figures.lengths:
        yield from _length_lines(figures.lengths)
    yield f"  truncated: {stats.num_truncated:,} examples"
    yield from _left_out_lines("dropped", stats.dropped)
    yield from _left_out_lines("skipped", stats.bad_records)
    if stats.num_moved_thinking:
        yield f"  thinking moved out of tags: {stats.num_moved_thinking:,} records"
    yield from (f"  warning: {line}" for line in control_text_lines(stats.control_text))
    if count := figures.num_without_thinking:
        yield f"  {count:,} examples have assistant messages that are not trained because their thinking is dropped"


def _length_lines(lengths: LengthStats) -> Iterator[str]:
    yield (
        f"  lengths: {lengths.shortest:,} to {lengths.longest:,} tokens, median {lengths.median:,.0f}, "
        f"mean {lengths.mean:,.0f}, 95 % up to {lengths.percentile_95:,.0f}"
    )
    most = max(count for _, _, count in lengths.histogram)
    for low, high, count in lengths.histogram:
        bar = "#" * -(-_BAR * count // most)
        yield f"    {low + 1:>7,} to {high:>7,} {count:>9,} {bar}".rstrip()


def _left_out_lines(title: str, bad_records: Sequence[BadRecord]) -> Iterator[str]:
    yield f"  {title}: {len(bad_records):,} records"
    for kind, places in _places(bad_records).items():
        yield f"    {len(places):,} {kind}"
        yield from (f"      {place}" for place in places[:_PLACES_SHOWN])
        if len(places) > _PLACES_SHOWN:
            yield f"      and {len(places) - _PLACES_SHOWN:,} more (--json names all)"
    if bad_records:
        yield f"    fix: {fix_for(bad_records)}"


def _duplicate_lines(duplicates: Mapping[str, Overlap]) -> Iterator[str]:
    yield "duplicates (records that repeat an earlier record, or one of the other split):"
    for name, overlap in duplicates.items():
        yield (
            f"  {name}: of {overlap.num_records:,} records {overlap.exact:,} the same, "
            f"{overlap.other_answer:,} the same question with another answer, {overlap.near:,} nearly the same"
        )
        for kind, where, other in overlap.examples:
            yield f"    {kind.replace('_', ' ')}: {where} and {other}"

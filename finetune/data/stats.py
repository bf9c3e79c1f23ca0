"""What is in a recipe's data, in figures: plain data for JSON, and the same as lines to read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.config.schema import RunConfig
from finetune.data.dataset import Split, load_split
from finetune.data.duplicates import Text, find_duplicates, text_of
from finetune.data.example_table import RecordTable, example_lengths
from finetune.data.harmony.encode import HEADER, Channel
from finetune.data.packing import Mixture, pack, packing_efficiency
from finetune.data.sources import BadRecord, split_names

_BINS = 12
_BAR = 40
_PLACES_SHOWN = 5


def collect(config: RunConfig, *, duplicates: bool = True) -> dict[str, Any]:
    """Read every split and count.

    Rows that cannot be used are counted here even where the recipe would stop at them.

    Args:
        config: the whole run.
        duplicates: also look for rows that repeat each other, which holds every row's text in memory and about 2 KB
            beside it.

    Returns:
        `splits` by name, and `duplicates` by pair of splits if asked for; plain data.

    Raises:
        FinetuneError: see `load_split`.
    """
    splits = {name: load_split(config.data, name, check=False) for name in split_names(config.data)}
    result: dict[str, Any] = {"splits": {name: _figures(split, config) for name, split in splits.items()}}
    if duplicates:
        found = find_duplicates({name: _texts(split) for name, split in splits.items()})
        result["duplicates"] = {name: dataclasses.asdict(overlap) for name, overlap in found.items()}
    return result


def describe_stats(result: Mapping[str, Any]) -> Iterator[str]:
    """What `collect` found, as lines."""
    for name, figures in result["splits"].items():
        yield from _split_lines(name, figures)
        yield ""
    if "duplicates" in result:
        yield from _duplicate_lines(result["duplicates"])


def _figures(split: Split, config: RunConfig) -> dict[str, Any]:
    trained, context = np.zeros(HEADER, dtype=np.int64), np.zeros(HEADER, dtype=np.int64)
    spellings = without_thinking = 0
    for sample in split.samples:
        channels = (sample.channels % HEADER).astype(np.int64)
        weighted = sample.weights > 0
        trained += np.bincount(channels[weighted], minlength=HEADER)
        context += np.bincount(channels[~weighted], minlength=HEADER)
        spellings += sample.num_control_spellings > 0
        without_thinking += sample.num_without_thinking > 0
    lengths = example_lengths(split.samples)
    return {
        "records": split.num_records,
        "samples": len(split.samples),
        "tokens": split.num_tokens,
        "trained": _by_channel(trained),
        "context": _by_channel(context),
        "lengths": _lengths(lengths),
        "packing": _packing(split, lengths, config),
        "sources": dict(split.source_sizes),
        "forms": dict(split.forms),
        "unused_keys": dict(split.unused),
        "truncated": split.num_truncated,
        "dropped": _left_out(split.dropped),
        "skipped": _left_out(split.bad_records),
        "samples_spelling_control_tokens": spellings,
        "samples_with_answers_untrained_for_lost_thinking": without_thinking,
        "fingerprint": split.fingerprint,
    }


def _by_channel(counts: NDArray[np.int64]) -> dict[str, int]:
    return {channel.name.lower(): int(counts[channel]) for channel in Channel if counts[channel]}


def _lengths(lengths: Sequence[int]) -> dict[str, Any]:
    """Quantiles, and a histogram of equal steps; a bin holds lengths above `from`, up to `to`. Nothing of no sample."""
    if len(lengths) == 0:
        return {}
    values = np.array(lengths)
    step = _round_step((values.max() - values.min()) / _BINS)
    edges = np.arange((values.min() - 1) // step * step, values.max() + step, step)
    counts, _ = np.histogram(values - 0.5, edges)
    bins = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    return {
        "shortest": int(values.min()),
        "median": float(np.median(values)),
        "mean": round(float(values.mean()), 1),
        "95_percent": float(np.percentile(values, 95)),
        "longest": int(values.max()),
        "histogram": [{"from": low, "to": high, "samples": count} for low, high, count in bins],
    }


def _round_step(least: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if step >= least:
                return step
        power *= 10


def _packing(split: Split, lengths: Sequence[int], config: RunConfig) -> dict[str, Any]:
    """The rows of the first epoch, as a run would pack them."""
    data = config.data
    taken = list(range(len(lengths)))
    if taken and split.name == "train":
        taken = Mixture(split.source_sizes, data.train, data.mix_temperature, config.seed).samples(0).tolist()
    sizes = [lengths[number] for number in taken]
    rows = pack(sizes, data.max_length, np.random.default_rng([config.seed, 0])) if data.pack else [
        [place] for place in range(len(taken))
    ]  # fmt: skip
    ends = np.cumsum([0, *split.source_sizes.values()])
    per_source = np.histogram(np.array(taken), ends)[0].tolist() if taken else [0] * len(split.source_sizes)
    return {
        "max_length": data.max_length,
        "samples": len(taken),
        "samples_by_source": dict(zip(split.source_sizes, per_source, strict=True)),
        "rows": len(rows),
        "efficiency": round(packing_efficiency(sizes, rows, data.max_length), 5),
    }


def _left_out(rows: Sequence[BadRecord]) -> dict[str, Any]:
    kinds = Counter(row.kind for row in rows)
    places: dict[str, list[str]] = {kind: [] for kind, _ in kinds.most_common()}
    for row in rows:
        places[row.kind].append(f"{row.where}: {row.reason}")
    return {"rows": len(rows), "kinds": dict(kinds.most_common()), "places": places}


def _texts(split: Split) -> list[Text]:
    records = split.records
    numbers = records.first_samples().tolist() if isinstance(records, RecordTable) else range(len(records))
    return [text_of(records[number].where, records[number].conversation) for number in numbers]


def _split_lines(name: str, figures: Mapping[str, Any]) -> Iterator[str]:
    total = max(1, figures["tokens"])
    yield f"{name}: {figures['records']:,} records, {figures['samples']:,} samples, {figures['tokens']:,} tokens"
    if not figures["samples"]:
        yield "  nothing to use: a run stops here"
    forms = ", ".join(f"{form} {count:,}" for form, count in figures["forms"].items())
    yield f"  form: {forms}"
    if figures["unused_keys"]:
        yield f"  keys not used: {', '.join(f'{key} {count:,}' for key, count in figures['unused_keys'].items())}"
    for what in ("trained", "context"):
        parts = ", ".join(f"{channel} {count:,}" for channel, count in figures[what].items()) or "nothing"
        yield f"  {what}: {parts} ({sum(figures[what].values()) / total:.1%} of all tokens)"
    packing = figures["packing"]
    if len(figures["sources"]) > 1:
        for source, size in figures["sources"].items():
            yield f"  source {source}: {size:,} samples, {packing['samples_by_source'][source]:,} in the first epoch"
    yield (
        f"  packing: {packing['samples']:,} samples into {packing['rows']:,} rows of {packing['max_length']:,} tokens, "
        f"{packing['efficiency']:.2%} filled"
    )
    if figures["lengths"]:
        yield from _length_lines(figures["lengths"])
    yield f"  truncated: {figures['truncated']:,} samples"
    for what in ("dropped", "skipped"):
        yield from _left_out_lines(what, figures[what])
    if spelt := figures["samples_spelling_control_tokens"]:
        yield f"  {spelt:,} samples have text that spells a control token, such as <\\|end|>; it stays text"
    if lost := figures["samples_with_answers_untrained_for_lost_thinking"]:
        yield f"  {lost:,} samples have assistant messages that are not trained since their thinking is dropped"


def _length_lines(lengths: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"  lengths: {lengths['shortest']:,} to {lengths['longest']:,} tokens, median {lengths['median']:,.0f}, "
        f"mean {lengths['mean']:,.0f}, 95 % up to {lengths['95_percent']:,.0f}"
    )
    most = max(entry["samples"] for entry in lengths["histogram"])
    for entry in lengths["histogram"]:
        bar = "#" * -(-_BAR * entry["samples"] // most)
        yield f"    {entry['from'] + 1:>7,} to {entry['to']:>7,} {entry['samples']:>9,} {bar}".rstrip()


def _left_out_lines(what: str, left_out: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {what}: {left_out['rows']:,} rows"
    for kind, places in left_out["places"].items():
        yield f"    {len(places):,} {kind}"
        yield from (f"      {place}" for place in places[:_PLACES_SHOWN])
        if len(places) > _PLACES_SHOWN:
            yield f"      and {len(places) - _PLACES_SHOWN:,} more (--json names all)"


def _duplicate_lines(duplicates: Mapping[str, Any]) -> Iterator[str]:
    yield "duplicates (rows that repeat an earlier row, or one of the other split):"
    for name, overlap in duplicates.items():
        yield (
            f"  {name}: of {overlap['rows']:,} rows {overlap['exact']:,} the same, "
            f"{overlap['other_answer']:,} the same question with another answer, {overlap['near']:,} nearly the same"
        )
        for kind, where, other in overlap["examples"]:
            yield f"    {kind.replace('_', ' ')}: {where} and {other}"

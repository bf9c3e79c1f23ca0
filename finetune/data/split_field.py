"""Which of a file's fields says what split a row belongs to, as far as names can tell."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from finetune.data.splits import SPLITS, SplitName

_WORDS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_MOST_VALUES = 20
_FIELD_NAMES = ("set", "subset", "partition", "fold")


@dataclass(frozen=True)
class SplitField:
    """A field that names splits, or seems to.

    Attributes:
        name: the field.
        splits: split -> the values that name it. Empty: the field may well mean something else.
        others: value that names no split -> how many rows have it.
        missing: rows without the field.
    """

    name: str
    splits: Mapping[SplitName, tuple[str, ...]]
    others: Mapping[str, int]
    missing: int

    @property
    def num_unnamed(self) -> int:
        """Rows that no value assigns to a split."""
        return sum(self.others.values()) + self.missing


def find_split_field(rows: Sequence[Mapping[str, str]], ignored: Collection[str]) -> SplitField | None:
    """Find the field with `train` among its values that leaves the fewest rows without a split.

    A value that is no split's name (`holdout`) may stand beside `train` if the field is called like one for splits or
    names two of them; such rows belong to no split. Where neither holds, or such a name comes without `train`, the
    field is returned without splits, so that the person can be asked.

    Args:
        rows: the fields of each row, texts that are too long for a name left out.
        ignored: fields that are known to mean something else.

    Returns:
        The field, or None if none looks like one.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for name, value in row.items():
            counts[name][value] += 1
    found = [
        _split_field(name, counter, len(rows))
        for name, counter in counts.items()
        if name not in ignored and len(counter) <= _MOST_VALUES
    ]
    seeming = [field for field in found if field is not None]
    return min(seeming, key=lambda field: (not field.splits, field.num_unnamed), default=None)


def _split_field(name: str, counter: Counter[str], num_rows: int) -> SplitField | None:
    splits: dict[SplitName, tuple[str, ...]] = {}
    others: dict[str, int] = {}
    for value, count in sorted(counter.items()):
        split = _SPLIT_OF.get(value.strip().lower())
        if split is None:
            others[value] = count
        else:
            splits[split] = (*splits.get(split, ()), value)
    splits = {split: splits[split] for split in SPLITS if split in splits}
    field = SplitField(name, splits, others, num_rows - counter.total())
    is_called_so = "split" in name.lower() or name.lower() in _FIELD_NAMES
    if "train" in splits and (is_called_so or len(splits) > 1 or not field.num_unnamed):
        return field
    if "train" in splits or is_called_so:
        return SplitField(name, {}, dict(sorted(counter.items())), field.missing)
    return None

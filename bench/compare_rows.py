"""The records that `bench/compare.py` trains and tests on: drawn once, the same for every variant and seed."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_plan import Labels, Task, TaskName

from finetune.config.paths import shipped_dir
from finetune.evaluate.evalset import SHIPPED

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Files of one task.

    Attributes:
        labels: candidate answers, None for prose.
        digest: of all files' bytes.
    """

    train: Path
    validation: Path
    test: Path
    labels: tuple[str, ...] | None
    digest: str


def write_rows(name: TaskName, task: Task, directory: Path, labels: Labels = "as they are") -> Rows:
    """Write a task's training, validation and test records.

    Args:
        directory: of the files; rewriting files of the same content is harmless.
        labels: `shuffled` permutes the training records' answers at random, so that nothing can be learnt from them
            but how frequent answers are. `renamed` gives every answer another one's name, the same in all splits, so
            that the name says nothing of the clause.
    """
    with gzip.open(shipped_dir("data") / SHIPPED[name], "rt", encoding="utf-8") as file:
        rows: list[Row] = [json.loads(line) for line in file]
    counts = {"train": task.train_rows, "val": task.validation_examples, "test": task.test_examples}
    drawn = {
        split: _draw([row for row in rows if row["split"] == split], count, random.Random(f"{split} rows"))
        for split, count in counts.items()
    }
    answers = sorted({row["answer"] for row in rows if row.get("answer")})
    if "renamed" in labels:
        names = derangement(answers)
        drawn = {split: [_answered(row, names[row["answer"]]) for row in part] for split, part in drawn.items()}
    if "shuffled" in labels:
        drawn["train"] = _shuffle_answers(drawn["train"], random.Random("shuffled"))
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for split, content in drawn.items():
        path = directory / f"{name}-{split}-{len(content)}-{labels.replace(' ', '-')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        files.append(path)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return Rows(*files, tuple(answers) or None, digest)


def derangement(answers: list[str]) -> dict[str, str]:
    """Each answer's new name: a fixed random permutation of the answers that leaves none where it was."""
    rng = random.Random("renamed")
    names = list(answers)
    while any(old == new for old, new in zip(answers, names, strict=True)):
        rng.shuffle(names)
    return dict(zip(answers, names, strict=True))


def _draw(rows: list[Row], count: int, rng: random.Random) -> list[Row]:
    return rows if count >= len(rows) else [rows[n] for n in sorted(rng.sample(range(len(rows)), count))]


def _shuffle_answers(rows: list[Row], rng: random.Random) -> list[Row]:
    answers = [row["answer"] for row in rows]
    rng.shuffle(answers)
    return [_answered(row, answer) for row, answer in zip(rows, answers, strict=True)]


def _answered(row: Row, answer: str) -> Row:
    """The record with another answer: the question stays, and any reasoning before the answer is removed."""
    return row | {"answer": answer, "messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]}

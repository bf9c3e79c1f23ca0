"""The rows that `bench/compare.py` trains and tests on: drawn once, the same for every variant and seed."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_plan import Task, TaskName

from finetune.config.locate import shipped_dir
from finetune.evaluate.testset import SHIPPED

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Files of one task.

    Attributes:
        labels: candidate answers, None for prose.
        digest: of both files' bytes.
    """

    train: Path
    test: Path
    labels: tuple[str, ...] | None
    digest: str


def write_rows(name: TaskName, task: Task, directory: Path, *, shuffled: bool) -> Rows:
    """Write a task's training and test rows.

    Args:
        directory: where files go; files of the same content are written again without harm.
        shuffled: deal the training rows' answers out among them anew: a control that nothing can be learnt from
            but how frequent answers are.
    """
    with gzip.open(shipped_dir("data") / SHIPPED[name], "rt", encoding="utf-8") as file:
        rows: list[Row] = [json.loads(line) for line in file]
    drawn = random.Random(0)
    train = _draw([row for row in rows if row["split"] == "train"], task.train_rows, drawn)
    test = _draw([row for row in rows if row["split"] == "test"], task.test_rows, drawn)
    if shuffled:
        train = _shuffle_answers(train, drawn)
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for split, content in (("train-shuffled" if shuffled else "train", train), ("test", test)):
        path = directory / f"{name}-{split}-{len(content)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        files.append(path)
    answers = sorted({row["answer"] for row in rows if row.get("answer")})
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return Rows(files[0], files[1], tuple(answers) or None, digest)


def _draw(rows: list[Row], count: int, rng: random.Random) -> list[Row]:
    return rows if count >= len(rows) else [rows[n] for n in sorted(rng.sample(range(len(rows)), count))]


def _shuffle_answers(rows: list[Row], rng: random.Random) -> list[Row]:
    """Only answers move: the question stays, and what was said before the answer (reasoning) goes."""
    answers = [row["answer"] for row in rows]
    rng.shuffle(answers)
    return [
        row | {"answer": answer, "messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]}
        for row, answer in zip(rows, answers, strict=True)
    ]

"""A fine-tuned model beside naive Bayes on the legal task: all records of one split, the same for both.

    python bench/naive_bayes.py RUN [RUN ...] [--split val] [--save naive-bayes]

Runs are finished `finetune train` runs on the shipped clauses, for instance of several seeds. Naive Bayes is
scikit-learn's multinomial one over the clause's words with add-one smoothing: over all words of two letters or more,
and over those that occur in two training clauses or more, which is stronger. Settings are chosen on `--split val`; test
is for the end.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from measure import machine, publish
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import f1_score
from sklearn.naive_bayes import MultinomialNB

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.dataset import load_split
from finetune.data.prepare.legal import CUAD
from finetune.data.sources import Record
from finetune.evaluate.labels import score_labels
from finetune.evaluate.opening import open_model
from finetune.evaluate.statistics import mcnemar, wilson_interval

NOTE = (
    "Accuracy: of all rows of the split, with its 95 % Wilson interval. `lost`, `gained`: rows that only naive Bayes, "
    "or only the model, had right, against naive Bayes over all words, with the exact McNemar p. `centred`: after "
    "taking each label's mean log-likelihood off."
)
LEAST_CLAUSES = (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--save", metavar="NAME", help="write the table to bench/results/DATE-NAME")
    arguments = parser.parse_args()
    facts = machine(torch.device("cpu")) | {"split": arguments.split}
    training, tested = records("train"), records(arguments.split)
    labels = tuple(sorted({str(record.answer) for record in training}))
    right = np.array([labels.index(str(record.answer)) for record in tested])
    chosen = {least: naive_bayes(training, tested, labels, least) for least in LEAST_CLAUSES}
    rows = [
        {"model": "naive Bayes" + (f", words of {least} clauses or more" if least > 1 else "")}
        | figures(right, chosen[least], len(labels))
        for least in LEAST_CLAUSES
    ]
    accuracies = []
    for run in arguments.runs:
        print(f"{run}: {len(tested)} examples", file=sys.stderr, flush=True)
        nats = likelihoods(run, arguments.split, labels)
        lost, gained, p = mcnemar(chosen[1] == right, nats.argmax(1) == right)
        row = {"model": run.name} | figures(right, nats.argmax(1), len(labels))
        row |= {"centred": round(float(((nats - nats.mean(0)).argmax(1) == right).mean()), 4)}
        rows.append(row | {"lost": lost, "gained": gained, "p": round(p, 3)})
        accuracies.append(float((nats.argmax(1) == right).mean()))
    rows.append({"model": f"mean of {len(accuracies)} runs", "accuracy": round(mean(accuracies), 4)})
    title = f"Naive Bayes beside {len(accuracies)} runs, {len(tested)} rows of {arguments.split}"
    publish(arguments.save or "naive-bayes", title, facts, rows, save=bool(arguments.save), note=NOTE)


def records(split: str) -> list[Record]:
    """The shipped clauses of a split."""
    return list(load_split(data_of(DataConfig(train={}), split), "test").records)


def data_of(data: DataConfig, split: str) -> DataConfig:
    """The run's data settings with a split of the shipped clauses as test records."""
    return replace(data, test={"cuad": SourceConfig(path=f"shipped://{CUAD.name}", where={"split": split})})


def naive_bayes(training: list[Record], tested: list[Record], labels: tuple[str, ...], least: int) -> NDArray[np.int64]:
    """Labels chosen by naive Bayes over the words that occur in `least` training clauses or more; int64 [n]."""
    words = CountVectorizer(min_df=least)
    model = MultinomialNB().fit(
        words.fit_transform([clause_of(record) for record in training]),
        [labels.index(str(record.answer)) for record in training],
    )
    found: NDArray[np.int64] = model.predict(words.transform([clause_of(record) for record in tested]))
    return found


def clause_of(record: Record) -> str:
    """The clause in a record's question, without the list of categories."""
    question = next(message for message in record.conversation.messages if message.role == "user")
    return str(question.content).partition("Clause:\n")[2]


def likelihoods(run: Path, split: str, labels: tuple[str, ...]) -> NDArray[np.float64]:
    """Log-likelihood of each label under a run's adapter; float64 [n, labels]."""
    opened = open_model(run)
    data = data_of(opened.data, split)
    return score_labels(opened.base.model, load_split(data, "test").records, labels, data).log_likelihood


def figures(right: NDArray[np.int64], chosen: NDArray[np.int64], num_labels: int) -> dict[str, Any]:
    """Accuracy with its interval, and macro-F1."""
    low, high = wilson_interval(int((right == chosen).sum()), len(right), 0.95)
    f1 = f1_score(right, chosen, labels=range(num_labels), average="macro", zero_division=0)
    return {
        "accuracy": round(float((right == chosen).mean()), 4),
        "95 %": f"{low:.3f} to {high:.3f}",
        "macro-F1": round(float(f1), 4),
    }


if __name__ == "__main__":
    main()

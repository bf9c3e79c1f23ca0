"""Build the shipped preference pairs from the shipped data, byte for byte: `python scripts/build_pairs.py [DIRECTORY]`.

Every pair has a partner with the two answers swapped after another prompt, so that within a split every answer text is
chosen exactly as often as it is rejected, and nothing about an answer alone (its words, its length) tells which wins.

* legal: the clause's type against another type. Two types are partners where word naive Bayes, trained on the train
  split, confuses them most; of each type's clauses the most confusable ones are taken, as many of one as of the other.
* medical: the abstract's conclusion, yes or no, against the other one; as many of one as of the other.
* creative: the author's own continuation against the other author's after the same passage; partners have lengths as
  close as possible.

Splits are those of the source files, hence disjoint by contract, abstract, and chapter or story.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.config.paths import shipped_dir

Record = dict[str, Any]
SPLITS = ("train", "val", "test")
SOURCES = {
    "legal/cuad_pairs.jsonl.gz": "legal/cuad_clause_type.jsonl.gz",
    "medical/pubmedqa_pairs.jsonl.gz": "medical/pubmedqa_labeled.jsonl.gz",
    "creative/fiction_pairs.jsonl.gz": "creative/fiction_continuation.jsonl.gz",
}
"""Written file -> the file that it is made from."""
_DOCUMENT_KEYS = ("contract", "pmid", "author", "work", "chapter", "source")
_WORD = re.compile(r"[a-z]{2,}")
_OTHER = {"yes": "no", "no": "yes"}


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else shipped_dir("data")
    builders = (legal_pairs, medical_pairs, creative_pairs)
    for (name, source), build in zip(SOURCES.items(), builders, strict=True):
        records = read_records(shipped_dir("data") / source)
        pairs = [pair for split in SPLITS for pair in build([r for r in records if r["split"] == split], records)]
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(packed(pairs))
        counts = Counter(pair["split"] for pair in pairs)
        print(f"{directory / name}: {', '.join(f'{counts[split]:,} {split}' for split in SPLITS)}")


def legal_pairs(records: Sequence[Record], all_records: Sequence[Record]) -> Iterator[Record]:
    """Pairs of one split of the clauses."""
    score = naive_bayes([record for record in all_records if record["split"] == "train"])
    scores = {record["id"]: score(record["messages"][1]["content"].partition("\n\nClause:\n")[2]) for record in records}
    clauses: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        clauses[record["answer"]].append(record)

    def confusability(record: Record, other: str) -> float:
        return scores[record["id"]][other] - scores[record["id"]][record["answer"]]

    def of_types(first: str, second: str) -> float:
        values = [confusability(record, second) for record in clauses[first]]
        values += [confusability(record, first) for record in clauses[second]]
        return sum(values) / len(values)

    types = sorted(clauses)
    partners = [(first, second) for number, first in enumerate(types) for second in types[number + 1 :]]
    chosen: list[tuple[Record, str]] = []
    for first, second in sorted(partners, key=lambda pair: (-round(of_types(*pair), 6), pair)):
        count = min(len(clauses[first]), len(clauses[second]))
        for own, other in ((first, second), (second, first)):
            by_confusion = sorted(clauses[own], key=lambda r: (-round(confusability(r, other), 6), r["id"]))
            chosen += [(record, other) for record in by_confusion[:count]]
            clauses[own] = by_confusion[count:]
    for record, other in sorted(chosen, key=lambda pair: pair[0]["id"]):
        yield pair_of(record, record["answer"], other)


def medical_pairs(records: Sequence[Record], all_records: Sequence[Record]) -> Iterator[Record]:
    """Pairs of one split of the abstracts; those answered `maybe` contradict neither answer and are left out."""
    by_answer = {answer: [record for record in records if record["answer"] == answer] for answer in _OTHER}
    count = min(map(len, by_answer.values()))
    chosen = [record for answer in _OTHER for record in by_answer[answer][:count]]
    for record in sorted(chosen, key=lambda record: record["id"]):
        instruction = record["messages"][0]["content"].replace("yes, no or maybe", "yes or no")
        messages = [{"role": "system", "content": instruction}, record["messages"][1]]
        yield pair_of(record | {"messages": messages}, record["answer"], _OTHER[record["answer"]])


def creative_pairs(records: Sequence[Record], all_records: Sequence[Record]) -> Iterator[Record]:
    """Pairs of one split of the passages: each passage of the rarer author with one of the other's."""
    by_author: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_author[record["author"]].append(record)
    rarer, commoner = sorted(by_author.values(), key=len)
    left = list(commoner)
    for record in rarer:
        other = min(left, key=lambda r: (abs(len(continuation(r)) - len(continuation(record))), r["id"]))
        left.remove(other)
        for own, foreign in ((record, other), (other, record)):
            yield pair_of(own, continuation(own), continuation(foreign))


def continuation(record: Record) -> str:
    """The author's text after the passage."""
    text: str = record["messages"][-1]["content"]
    return text


def pair_of(record: Record, chosen: str, rejected: str) -> Record:
    """A pair after a record's prompt, with the fields that name its document."""
    prompt = [message for message in record["messages"] if message["role"] != "assistant"]
    fields = {key: record[key] for key in _DOCUMENT_KEYS if key in record}
    head = {"id": f"{record['id']}-pair", "split": record["split"]}
    return head | {"prompt": prompt, "chosen": chosen, "rejected": rejected} | fields


def naive_bayes(records: Sequence[Record]) -> Callable[[str], dict[str, float]]:
    """A classifier of clauses: text -> log-likelihood of each type, in nats per word, with add-one smoothing."""
    words: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        words[record["answer"]].update(
            _WORD.findall(record["messages"][1]["content"].partition("\n\nClause:\n")[2].lower())
        )
    vocabulary = len(set().union(*words.values()))
    totals = {answer: counter.total() + vocabulary for answer, counter in words.items()}

    def score(text: str) -> dict[str, float]:
        counts = Counter(_WORD.findall(text.lower()))
        length = max(1, counts.total())
        return {
            answer: math.fsum(n * math.log((counter[word] + 1) / totals[answer]) for word, n in counts.items()) / length
            for answer, counter in words.items()
        }

    return score


def read_records(path: Path) -> list[Record]:
    """The records of a gzipped JSONL file."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().rstrip("\n").split("\n")]


def packed(records: Sequence[Record]) -> bytes:
    """Records as gzipped JSONL without a time or a name in it."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return gzip.compress(lines.encode(), compresslevel=9, mtime=0)


if __name__ == "__main__":
    main()

"""`finetune data prepare`: build a data set that a package may not carry from its public source, byte for byte.

A checkout has the medical sample; a wheel does not, because its abstracts are not ours to redistribute. What is built
here equals the checkout's file, or is refused: source files and result are compared with sha256 sums.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from finetune.config.locate import prepared_dir, shipped_dir
from finetune.console import say
from finetune.errors import InputError, MachineError

PUBMEDQA_COMMIT = "1cbae8e92f72f20c8d3747cbb3bf5bc53554d997"
PUBMEDQA_SOURCE = f"https://raw.githubusercontent.com/pubmedqa/pubmedqa/{PUBMEDQA_COMMIT}"
PUBMEDQA_FILES = {
    "data/ori_pqal.json": "8b3276be8942ebbd77f3ddcda12c1749bf0e490045a736fd8438ee40cf37a41d",
    "data/test_ground_truth.json": "939fe566f09017d13b1ca64d2ddfee0bc2374b366048152997669cccedc44d51",
    "LICENSE": "8e75abc6136be91e5ae66dbb6dda07c8bc9dcc215ed3bc1ba3ae7fab7904777e",
}
PUBMEDQA_NAME = "medical/pubmedqa_labeled.jsonl.gz"
PUBMEDQA_SHA256 = "b99da8e014dbf17a1f90401fb977d7d8c25df1ed171241d24f0e22343090fb99"  # of the decompressed content
VALIDATION_SHARE = 0.1
TIMEOUT_SECONDS = 30
_SYSTEM = (
    "You are a biomedical research assistant. Read the abstract and answer the question with exactly one word: "
    "yes, no or maybe."
)


def prepare_medical(source: str | None = None) -> Path:
    """Build the PubMedQA sample, unless this installation has it.

    Args:
        source: a directory or an http(s) address that holds the files of `PUBMEDQA_FILES` (a clone of the repository,
            where there is no network). None: GitHub, at `PUBMEDQA_COMMIT`.

    Returns:
        The file that `shipped://medical/pubmedqa_labeled.jsonl.gz` means from then on.

    Raises:
        InputError: a source file is missing or is not the one that the sample was made from.
        MachineError: the source cannot be reached.
    """
    for folder in (shipped_dir("data"), prepared_dir()):
        if (folder / PUBMEDQA_NAME).is_file():
            found = hashlib.sha256(gzip.decompress((folder / PUBMEDQA_NAME).read_bytes())).hexdigest()
            if found == PUBMEDQA_SHA256:
                say(f"already there, sha256 {found[:12]} as it should be")
                return folder / PUBMEDQA_NAME
            raise InputError(
                f"{folder / PUBMEDQA_NAME} has sha256 {found[:12]}, not {PUBMEDQA_SHA256[:12]}",
                why="it was changed or damaged",
                fix="remove it and prepare again",
            )
    files = {name: _checked(name, _read(source or PUBMEDQA_SOURCE, name), expected) for name, expected in
             PUBMEDQA_FILES.items()}  # fmt: skip
    content = pubmedqa_records(
        json.loads(files["data/ori_pqal.json"]), json.loads(files["data/test_ground_truth.json"])
    )
    _checked(PUBMEDQA_NAME, content, PUBMEDQA_SHA256)
    target = prepared_dir() / PUBMEDQA_NAME
    _write(target.parent / "LICENSE.pubmedqa", files["LICENSE"])
    _write(target, gzip.compress(content, 9, mtime=0))
    say("PubMedQA (MIT); the abstracts may carry their publishers' rights. No medical advice.")
    return target


def pubmedqa_records(abstracts: dict[str, dict[str, Any]], test_ids: dict[str, str]) -> bytes:
    """Put PubMedQA's expert-labelled part into this toolkit's records.

    Args:
        abstracts: PMID -> abstract, the content of `ori_pqal.json`.
        test_ids: PMIDs of the official test set -> answer, the content of `test_ground_truth.json`.

    Returns:
        JSON lines, UTF-8: test, train, val, each sorted by PMID as text. A tenth of what is not test, by hash of the
        PMID, is val.
    """
    lines = []
    for pmid, abstract in abstracts.items():
        hashed = int(hashlib.sha256(pmid.encode()).hexdigest()[:8], 16) / 2**32
        split = "test" if pmid in test_ids else "val" if hashed < VALIDATION_SHARE else "train"
        parts = [f"{label}: {text}" for label, text in zip(abstract["LABELS"], abstract["CONTEXTS"], strict=True)]
        answer = abstract["final_decision"]
        record = {
            "id": f"pubmedqa-{pmid}",
            "domain": "medical",
            "task": "pubmedqa",
            "split": split,
            "messages": [
                {"role": "system", "content": _SYSTEM},
                {"role": "user", "content": "\n\n".join([*parts, f"Question: {abstract['QUESTION']}"])},
                {"role": "assistant", "thinking": abstract["LONG_ANSWER"], "content": answer},
            ],
            "answer": answer,
            "pmid": pmid,
            "year": abstract["YEAR"],
            "source": "PubMedQA PQA-L (MIT)",
        }
        lines.append((split, pmid, json.dumps(record, ensure_ascii=False) + "\n"))
    return "".join(line for _, _, line in sorted(lines)).encode()


def _read(source: str, name: str) -> bytes:
    place = f"{source.rstrip('/')}/{name}"
    if "://" not in source:
        path = Path(source).expanduser() / name
        if not path.is_file():
            raise InputError(f"there is no file {path}", fix="give a clone of https://github.com/pubmedqa/pubmedqa")
        return path.read_bytes()
    if not place.startswith(("http://", "https://")):
        raise InputError(f"{source} is neither a directory nor an http(s) address")
    say(f"reading {place}")
    try:
        with urllib.request.urlopen(place, timeout=TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read()
    except (OSError, urllib.error.URLError) as error:
        raise MachineError(
            f"{place} cannot be read: {getattr(error, 'reason', error)}",
            fix="where there is a network: git clone https://github.com/pubmedqa/pubmedqa; bring the directory and "
            "give it with --from DIR",
        ) from None
    return content


def _checked(name: str, content: bytes, expected: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise InputError(
            f"{name} has sha256 {found[:12]}, not {expected[:12]}",
            why="it is not the file that the sample was made from, so figures could not be compared",
            fix=f"use the repository as of commit {PUBMEDQA_COMMIT[:12]}",
        )
    return content


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: a second process or a full disk leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise

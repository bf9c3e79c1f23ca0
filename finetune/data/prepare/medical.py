"""The medical data set: PubMedQA's expert-labelled part, as records of this toolkit."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from finetune.data.prepare.upstream import Upstream

COMMIT = "1cbae8e92f72f20c8d3747cbb3bf5bc53554d997"
PUBMEDQA = Upstream(
    name="medical/pubmedqa_labeled.jsonl.gz",
    sha256="b99da8e014dbf17a1f90401fb977d7d8c25df1ed171241d24f0e22343090fb99",
    files={
        "data/ori_pqal.json": "8b3276be8942ebbd77f3ddcda12c1749bf0e490045a736fd8438ee40cf37a41d",
        "data/test_ground_truth.json": "939fe566f09017d13b1ca64d2ddfee0bc2374b366048152997669cccedc44d51",
        "LICENSE": "8e75abc6136be91e5ae66dbb6dda07c8bc9dcc215ed3bc1ba3ae7fab7904777e",
    },
    addresses={"": f"https://raw.githubusercontent.com/pubmedqa/pubmedqa/{COMMIT}"},
    bring="git clone https://github.com/pubmedqa/pubmedqa",
    terms="PubMedQA (MIT); the abstracts may carry their publishers' rights. No medical advice.",
    beside={"LICENSE": "LICENSE.pubmedqa"},
)
VALIDATION_SHARE = 0.1
_SYSTEM = (
    "You are a biomedical research assistant. Read the abstract and answer the question with exactly one word: "
    "yes, no or maybe."
)


def pubmedqa_records(files: dict[str, bytes]) -> bytes:
    """Convert PubMedQA's expert-labelled part to records of this toolkit.

    Args:
        files: of `PUBMEDQA`: abstracts by PMID, and the answers of the official test set by PMID.

    Returns:
        JSON lines, UTF-8: test, train, val, each sorted by PMID as text. A tenth of what is not test, by hash of the
        PMID, is val.
    """
    abstracts: dict[str, dict[str, Any]] = json.loads(files["data/ori_pqal.json"])
    test_ids: dict[str, str] = json.loads(files["data/test_ground_truth.json"])
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

"""The legal data set: clauses that CUAD's annotators gave one category, as records of this toolkit.

Of the 41 columns of CUAD's table the 24 below are used. A clause is taken if it is in one column only, has
`LEAST_LENGTH` to `MOST_LENGTH` characters, and did not occur before (compared by lower-case letters and digits).
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator

from finetune.data.prepare.upstream import Upstream
from finetune.errors import InputError

TABLE = "master_clauses.csv"
COMMIT = "fb5e5cae0bdd1e16fa4d9bc6fee310ea205bc020"
CUAD = Upstream(
    name="legal/cuad_clause_type.jsonl.gz",
    sha256="5a298e9e5bf933728b54577b5a8e43e6c05bf1c8230343022cad75d4542c716a",
    # Copies of the table differ in line ends and in answers that are not read: the built file's sum decides.
    files={TABLE: None},
    addresses={"": f"https://raw.githubusercontent.com/raindartt/Project_623/{COMMIT}"},
    bring="git clone https://github.com/raindartt/Project_623 (a copy of CUAD's table), or unpack CUAD's own release",
    terms="CUAD v1, The Atticus Project, CC BY 4.0. No legal advice.",
)
CATEGORIES = (
    "License Grant", "Cap On Liability", "Audit Rights", "Anti-Assignment", "Insurance", "Governing Law",
    "Post-Termination Services", "Revenue/Profit Sharing", "Minimum Commitment", "Exclusivity", "Rofr/Rofo/Rofn",
    "Ip Ownership Assignment", "Non-Compete", "Termination For Convenience", "Change Of Control", "Renewal Term",
    "Volume Restriction", "Warranty Duration", "Covenant Not To Sue", "Uncapped Liability", "Liquidated Damages",
    "No-Solicit Of Employees", "Source Code Escrow", "Non-Disparagement",
)  # fmt: skip
LEAST_LENGTH, MOST_LENGTH = 60, 1800
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
# Its one clause differs from another contract's by a capital, and the sample has the later one. The reason was not
# recorded; without this exception the two would change places.
LEFT_OUT = "ClickstreamCorp_20200330_1-A_EX1A-6 MAT CTRCT_12089935_EX1A-6 MAT CTRCT_Development Agreement.pdf"
_SYSTEM = (
    "You are a contract-review assistant. Classify the clause into exactly one of the listed categories and answer "
    "with the category name only."
)

Entry = tuple[str, str, str]


def cuad_records(files: dict[str, bytes]) -> bytes:
    """Convert CUAD's clauses to records of this toolkit.

    Args:
        files: of `CUAD`: the table with one contract per row and a list of clauses in each category's column.

    Returns:
        JSON lines, UTF-8: test, train, val, each sorted by the hash of the question. The hash of a contract's name
        decides its split: a fifth is test, a tenth val.

    Raises:
        InputError: the file is no such table.
    """
    found = []
    for contract, category, clause in select(list(read_table(files[TABLE]))):
        question = f"Categories: {'; '.join(CATEGORIES)}\n\nClause:\n{clause}"
        order = hashlib.sha256(question.encode()).hexdigest()
        found.append((split_of(contract), order, question, category, contract))
    found.sort()
    lines = []
    for number, (split, _, question, category, contract) in enumerate(found):
        record = {
            "id": f"cuad-type-{number:05d}",
            "domain": "legal",
            "task": "clause_type",
            "split": split,
            "messages": [
                {"role": "system", "content": _SYSTEM},
                {"role": "user", "content": question},
                {"role": "assistant", "content": category},
            ],
            "answer": category,
            "contract": contract,
            "source": "CUAD v1 (The Atticus Project), CC BY 4.0",
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def read_table(content: bytes) -> Iterator[Entry]:
    """Yield contract, category and clause of every clause, in file order; white space in a clause is normalised.

    Raises:
        InputError: columns are missing, or a cell is no list.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{TABLE} is not UTF-8: {error.reason} at byte {error.start}", fix=CUAD.bring) from None
    rows = csv.DictReader(io.StringIO(text, newline=""))
    names = [name for name in rows.fieldnames or () if name != "Filename" and not name.endswith("Answer")]
    if "Filename" not in (rows.fieldnames or ()) or (missing := [name for name in CATEGORIES if name not in names]):
        raise InputError(
            f"{TABLE} lacks the column {missing[0] if 'Filename' in (rows.fieldnames or ()) else 'Filename'!r}",
            why="it is not CUAD v1's table; some copies write the columns' names otherwise",
            fix=f"take it from CUAD's own release, or: {CUAD.bring}",
        )
    for number, row in enumerate(rows, 2):
        for name in names:
            for clause in _clauses(row[name], f"{TABLE}: contract {number}, column {name!r}"):
                yield row["Filename"], name, " ".join(clause.split())


def _clauses(cell: str | None, where: str) -> list[str]:
    try:
        clauses = ast.literal_eval(cell or "[]")
    except (SyntaxError, ValueError):
        clauses = None
    if not isinstance(clauses, list) or not all(isinstance(clause, str) for clause in clauses):
        raise InputError(f"{where} is no list of clauses", why="the table was changed, or cut off", fix=CUAD.bring)
    return clauses


def select(entries: list[Entry]) -> Iterator[Entry]:
    """The clauses that become records, in the table's order."""
    categories = defaultdict(set)
    for _, category, clause in entries:
        categories[clause].add(category)
    seen = set()
    for contract, category, clause in entries:
        letters = re.sub("[^a-z0-9]", "", clause.lower())
        usable = LEAST_LENGTH <= len(clause) <= MOST_LENGTH and len(categories[clause]) == 1
        if category not in CATEGORIES or not usable or letters in seen:
            continue
        if contract != LEFT_OUT or category != "Governing Law":
            seen.add(letters)
            yield contract, category, clause


def split_of(contract: str) -> str:
    """The split of a contract's clauses."""
    hashed = int(hashlib.sha256(contract.encode()).hexdigest()[:8], 16) / 2**32
    return "test" if hashed < TEST_SHARE else "val" if hashed < TEST_SHARE + VALIDATION_SHARE else "train"

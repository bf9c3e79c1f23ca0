"""`finetune data prepare` builds the checkout's file byte for byte, or refuses; nothing half-written is left behind."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import html
import io
import json
import re
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from finetune.config.paths import resolve_data_path, shipped_dir
from finetune.data.dataset import load_split
from finetune.data.prepare import build as prepare
from finetune.data.prepare import legal
from finetune.data.prepare.creative import passages, read_r_strings
from finetune.errors import InputError

SAMPLE = shipped_dir("data") / prepare.PUBMEDQA.name
LEGAL = shipped_dir("data") / prepare.CUAD.name
FICTION = shipped_dir("data") / prepare.FICTION.name
pytestmark = pytest.mark.skipif(not SAMPLE.is_file(), reason="this source tree has no medical sample")


def published() -> tuple[dict[str, Any], dict[str, str]]:
    """The sample turned back into the published files' form (keys that building does not read are left out)."""
    abstracts, test_ids = {}, {}
    for line in gzip.decompress(SAMPLE.read_bytes()).decode().split("\n")[:-1]:
        record = json.loads(line)
        *contexts, question = record["messages"][1]["content"].split("\n\n")
        labelled = [context.partition(": ") for context in contexts]
        abstracts[record["pmid"]] = {
            "QUESTION": question.removeprefix("Question: "),
            "CONTEXTS": [text for _, _, text in labelled],
            "LABELS": [label for label, _, _ in labelled],
            "YEAR": record["year"],
            "final_decision": record["answer"],
            "LONG_ANSWER": record["messages"][2]["thinking"],
        }
        if record["split"] == "test":
            test_ids[record["pmid"]] = record["answer"]
    # The published file's order is another one, and must not matter.
    return dict(sorted(abstracts.items(), key=lambda item: hash_of(item[0]))), test_ids


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory like a clone of the source, and an installation without the sample."""
    directory, installed = tmp_path / "clone", tmp_path / "installed"
    (directory / "data").mkdir(parents=True)
    installed.mkdir()
    abstracts, test_ids = published()
    (directory / "data" / "ori_pqal.json").write_text(json.dumps(abstracts, indent=4))
    (directory / "data" / "test_ground_truth.json").write_text(json.dumps(test_ids))
    (directory / "LICENSE").write_text("MIT License\n")
    sums = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in prepare.PUBMEDQA.files}
    monkeypatch.setattr(prepare, "PUBMEDQA", replace(prepare.PUBMEDQA, files=sums))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    for module in ("finetune.data.prepare.build", "finetune.config.paths"):
        monkeypatch.setattr(f"{module}.shipped_dir", lambda name: installed)
    return directory


@pytest.fixture
def address(clone: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(clone))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_built_over_http_it_equals_the_file_of_the_checkout(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = re.search(
        r"medical/.*?sha256\*\*: `([0-9a-f]{64})`", (SAMPLE.parents[1] / "LICENSES.md").read_text(), re.S
    )
    assert recorded and recorded[1] == prepare.PUBMEDQA.sha256
    wanted = "shipped://" + prepare.PUBMEDQA.name
    assert not resolve_data_path(wanted).exists()
    monkeypatch.setattr(prepare, "PUBMEDQA", replace(prepare.PUBMEDQA, addresses={"": address}))
    assert main(["data", "prepare", "medical"]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == resolve_data_path(wanted)
    assert gzip.decompress(written.read_bytes()) == gzip.decompress(SAMPLE.read_bytes())
    assert sorted(file.name for file in written.parent.iterdir()) == ["LICENSE.pubmedqa", SAMPLE.name]
    before = written.stat().st_mtime_ns
    assert main(["data", "prepare", "medical", "--from", "http://127.0.0.1:1"]) == 0  # nothing is read again
    assert written.stat().st_mtime_ns == before
    for damaged in (gzip.compress(b"{}\n"), SAMPLE.read_bytes()[:-100], b"no gzip"):
        written.write_bytes(damaged)
        assert main(["data", "prepare", "medical"]) == 3
        assert "changed or damaged" in capsys.readouterr().err


def test_other_source_files_are_refused(clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    abstracts = clone / "data" / "ori_pqal.json"
    whole = abstracts.read_text()
    abstracts.write_text(whole.replace("significant", "insignificant", 1))
    assert main(["data", "prepare", "medical", "--from", str(clone)]) == 3
    assert "data/ori_pqal.json has sha256" in capsys.readouterr().err
    abstracts.unlink()
    assert main(["data", "prepare", "medical", "--from", str(clone)]) == 3
    assert main(["data", "prepare", "medical", "--from", "http://127.0.0.1:1"]) == 5
    said = capsys.readouterr().err
    assert "there is no file" in said and "--from DIR" in said
    assert not (tmp_path / "home").exists()
    abstracts.write_text(whole)
    assert main(["data", "prepare", "medical", "--from", str(clone)]) == 0


def test_a_recipe_names_the_command_that_gets_the_data(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = compose_medical()
    with pytest.raises(InputError, match="finetune data prepare medical"):
        load_split(data, "train")
    assert main(["data", "prepare", "medical", "--from", str(clone)]) == 0
    assert len(load_split(data, "validation").examples) == 63


def compose_medical() -> Any:
    from finetune.config.schema import DataConfig, SourceConfig

    sources = {split: {"pubmedqa": SourceConfig(path="shipped://" + prepare.PUBMEDQA.name, where={"split": value})}
               for split, value in (("train", "train"), ("validation", "val"))}  # fmt: skip
    return DataConfig(**sources)


def r_strings(texts: list[str | None]) -> bytes:
    """An R data file that holds one character vector, as R 4 writes it (by hand, from R Internals 1.8)."""

    def string(text: str | None) -> bytes:
        encoded = (text or "").encode()
        return struct.pack(">ii", 0x40009, -1 if text is None else len(encoded)) + encoded

    begins = b"RDX3\nX\n" + struct.pack(">iiii", 3, 0x40100, 0x30500, 5) + b"UTF-8"
    named = struct.pack(">ii", 0x402, 1) + string("emma") + struct.pack(">ii", 0x10, len(texts))
    return bz2.compress(begins + named + b"".join(map(string, texts)) + struct.pack(">i", 0xFE))


def test_r_data_files_are_read() -> None:
    assert read_r_strings(r_strings(["EMMA", "", None, "naïve “café”"])) == ["EMMA", "", "", "naïve “café”"]
    for wrong in (b"RDX3\nA\n", b"RDX3\nX\n" + struct.pack(">iiii", 2, 0, 0, 19)):
        with pytest.raises(InputError, match="R data file"):
            read_r_strings(bz2.compress(wrong))


def test_passages_are_whole_sentences_and_a_short_end_is_omitted() -> None:
    sentence = " ".join(["Word"] * 24) + " end."  # 25 words: 5 make a passage, 8 a continuation, 4 are too few for one
    found = list(passages([f"{sentence} {sentence}", " ".join([sentence] * 20)]))
    assert [[text.count("end.") for text in pair] for pair in found] == [[5, 8]]
    assert found[0][0].index("\n") == 2 * len(sentence) + 1 and "\n" not in found[0][1]
    assert list(passages([" ".join([sentence] * 9)])) == []
    assert len(list(passages([" ".join([sentence] * 10)]))) == 1
    # A quotation ends a sentence, whatever follows; a full stop only before a capital or a quotation.
    quoted = f'{" ".join([sentence] * 4)} {"Word etc. " * 3}Now "Is it so?" he said. {" ".join([sentence] * 6)}'
    (passage, continuation), *_ = passages([quoted])
    assert passage.endswith('etc. Now "Is it so?"') and continuation.startswith("he said. Word")


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The creative sample turned back into novels and stories (without what was left out of it)."""
    chapters: dict[str, dict[str, list[str]]] = {}
    for line in gzip.decompress(FICTION.read_bytes()).decode().split("\n")[:-1]:
        record = json.loads(line)
        passage = record["messages"][1]["content"].partition("\n\n")[2]
        parts = chapters.setdefault(record["work"], {}).setdefault(record["chapter"], [])
        parts += [*passage.split("\n"), *record["messages"][2]["content"].split("\n")]
    *novels, stories = chapters.values()
    story_files = [path for path in prepare.FICTION.files if path.endswith(".xhtml")]
    files = [path for path in prepare.FICTION.files if path.endswith(".rda")]
    contents = {path: novel_file(novel) for path, novel in zip(files, novels, strict=True)}
    contents |= {path: story_file(*story) for path, story in zip(story_files, stories.items(), strict=True)}
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    sums = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
    monkeypatch.setattr(prepare, "FICTION", replace(prepare.FICTION, files=sums))
    return tmp_path


def novel_file(chapters: dict[str, list[str]]) -> bytes:
    lines: list[str | None] = ["A TITLE", ""]
    for number, paragraphs in enumerate(chapters.values(), 1):
        lines += ["", f"CHAPTER {number}", None]
        for paragraph in paragraphs:
            first, _, others = paragraph.partition(" ")
            lines += [first, f" {others}", ""] if others else [first, ""]
    return r_strings(lines)


def story_file(title: str, paragraphs: list[str]) -> bytes:
    body = "".join(f"<p>{html.escape(text).replace('—', chr(0x2060) + '<i>—</i>')}</p>\n" for text in paragraphs)
    page = f"<head><title>{title}</title></head><body><h2>{title}</h2>{body}</body>"
    return f'<html xmlns="http://www.w3.org/1999/xhtml">{page}</html>'.encode()


def test_fiction_is_built_as_shipped(books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "fiction.jsonl.gz"
    command = ["data", "prepare", "creative", "--from", str(books), "--out", str(out)]
    assert main(command) == 0
    assert gzip.decompress(out.read_bytes()) == gzip.decompress(FICTION.read_bytes())
    assert main(command) == 2 and "already exists" in capsys.readouterr().err
    assert main(["data", "prepare", "creative"]) == 0 and "already there" in capsys.readouterr().err
    next(books.rglob("emma.rda")).unlink()
    assert main([*command[:-1], f"{out}.again"]) == 3 and "git clone" in capsys.readouterr().err


def clause_table(rows: dict[str, dict[str, list[str]]], columns: tuple[str, ...]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["Filename", *(name for each in columns for name in (each, f"{each}-Answer"))])
    writer.writeheader()
    for contract, cells in rows.items():
        writer.writerow({"Filename": contract} | {name: repr(cells.get(name, [])) for name in columns})
    return text.getvalue().encode()


@pytest.fixture
def clauses() -> dict[str, dict[str, list[str]]]:
    """The legal sample turned back into CUAD's table, with clauses in it that must be left out."""
    rows: dict[str, dict[str, list[str]]] = {}
    for line in gzip.decompress(LEGAL.read_bytes()).decode().split("\n")[:-1]:
        record = json.loads(line)
        clause = record["messages"][1]["content"].partition("Clause:\n")[2]
        rows.setdefault(record["contract"], {}).setdefault(record["answer"], []).append(clause.replace(" ", "\n ", 1))
    kept_elsewhere = "This Agreement shall be governed by the laws of the state of Florida."
    rows = {legal.LEFT_OUT: rows.pop(legal.LEFT_OUT) | {"Governing Law": [kept_elsewhere]}} | rows
    first = next(iter(rows.values()))
    again = next(iter(first.values()))[0]
    first["Parties"] = ["A clause of a column that is not used, however long the clause may happen to be."]
    two_columns = "A clause that the annotators found to be of two kinds, which has no one right answer."
    rows["extra.pdf"] = {"Insurance": ["Too short.", "Too long. " * 181, two_columns, again.upper() + " --"],
                         "License Grant": [two_columns]}  # fmt: skip
    return rows


def test_clauses_are_built_as_shipped(
    clauses: dict[str, dict[str, list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / legal.TABLE, tmp_path / "out" / "clauses.jsonl.gz"
    columns = ("Parties", *legal.CATEGORIES)
    table.write_bytes(clause_table(clauses, columns))
    command = ["data", "prepare", "legal", "--from", str(tmp_path), "--out", str(out)]
    assert main(command) == 0
    assert gzip.decompress(out.read_bytes()) == gzip.decompress(LEGAL.read_bytes())
    out.unlink()
    table.write_bytes(clause_table(clauses, columns).replace(b"Licensee", b"Licencee", 1))
    assert main(command) == 3 and f"{prepare.CUAD.name} has sha256" in capsys.readouterr().err
    table.write_bytes(clause_table(clauses, columns[:-1]))
    assert main(command) == 3 and "lacks the column 'Non-Disparagement'" in capsys.readouterr().err
    table.write_bytes(b"not a table\n")
    assert main(command) == 3 and "lacks the column 'Filename'" in capsys.readouterr().err
    for cell in (b"['Too short.", b"None, ['Too short.'", b"[1, 'Too short.'"):
        table.write_bytes(clause_table(clauses, columns).replace(b"['Too short.'", cell, 1))
        assert main(command) == 3 and "column 'Insurance' is no list of clauses" in capsys.readouterr().err
    table.write_bytes(clause_table(clauses, columns).decode().encode("latin-1", "replace") + b"\xe9")
    assert main(command) == 3 and "is not UTF-8" in capsys.readouterr().err
    assert not out.exists()

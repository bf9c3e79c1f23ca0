"""`finetune data prepare` builds the checkout's file byte for byte, or refuses; nothing half-written is left behind."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from finetune.config.locate import resolve_data_path, shipped_dir
from finetune.data import prepare
from finetune.data.dataset import load_split

SAMPLE = shipped_dir("data") / prepare.PUBMEDQA_NAME
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
    sums = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in prepare.PUBMEDQA_FILES}
    monkeypatch.setattr(prepare, "PUBMEDQA_FILES", sums)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    for module in ("finetune.data.prepare", "finetune.config.locate"):
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


def test_over_http_it_is_the_checkouts_file(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = re.search(
        r"medical/.*?sha256\*\*: `([0-9a-f]{64})`", (SAMPLE.parents[1] / "LICENSES.md").read_text(), re.S
    )
    assert recorded and recorded[1] == prepare.PUBMEDQA_SHA256
    wanted = "shipped://" + prepare.PUBMEDQA_NAME
    assert not resolve_data_path(wanted).exists()
    monkeypatch.setattr(prepare, "PUBMEDQA_SOURCE", address)
    assert main(["data", "prepare", "medical"]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == resolve_data_path(wanted)
    assert gzip.decompress(written.read_bytes()) == gzip.decompress(SAMPLE.read_bytes())
    assert sorted(file.name for file in written.parent.iterdir()) == ["LICENSE.pubmedqa", SAMPLE.name]
    before = written.stat().st_mtime_ns
    assert main(["data", "prepare", "medical", "--from", "http://127.0.0.1:1"]) == 0  # nothing is read again
    assert written.stat().st_mtime_ns == before
    written.write_bytes(gzip.compress(b"{}\n"))
    assert main(["data", "prepare", "medical"]) == 3
    assert "changed or damaged" in capsys.readouterr().err


def test_what_is_not_the_source_is_refused(clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_recipe_says_how_to_get_it(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.errors import InputError

    data = compose_medical()
    with pytest.raises(InputError, match="finetune data prepare medical"):
        load_split(data, "train")
    assert main(["data", "prepare", "medical", "--from", str(clone)]) == 0
    assert len(load_split(data, "validation").samples) == 63


def compose_medical() -> Any:
    from finetune.config.schema import DataConfig, SourceConfig

    sources = {split: {"pubmedqa": SourceConfig(path="shipped://" + prepare.PUBMEDQA_NAME, where={"split": value})}
               for split, value in (("train", "train"), ("validation", "val"))}  # fmt: skip
    return DataConfig(**sources)

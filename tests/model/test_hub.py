"""Finding a base: directories, and hub names against a server on localhost.

huggingface_hub reads its environment when it is imported, so each look-up runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import COMMIT, REPO, Hub, serve

from finetune.errors import ConfigError, InputError
from finetune.model.hub import locate_base

ROOT = Path(__file__).parents[2]
# Every file differs: the cache keeps equal contents once.
WANTED = {
    name: f"content of {name}\n".encode() * 100
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "LICENSE",
        "USAGE_POLICY",
    )
}
UNWANTED = {
    name: f"content of {name}\n".encode()
    for name in ("README.md", ".gitattributes", "original/config.json", "original/model.safetensors", "metal/model.bin")
}
PROGRAM = """
import json, sys
from finetune.errors import FinetuneError
from finetune.model.hub import locate_base
try:
    base = locate_base(sys.argv[1], sys.argv[2] or None)
    print(json.dumps({"directory": str(base.directory), "name": base.name, "revision": base.revision}))
except FinetuneError as error:
    print(json.dumps({"exit_code": error.exit_code, "message": str(error)}))
"""


@dataclass
class Place:
    """A hub, and a home of its own to download into."""

    hub: Hub
    home: Path

    def locate(self, name: str = REPO, revision: str = "", **environment: str) -> dict[str, object]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, name, revision],
            env={**inherited, **settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT), **environment},
            cwd=self.home.parent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        answer: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
        return answer

    def failure(self, name: str = REPO, revision: str = "", **environment: str) -> tuple[object, str]:
        answer = self.locate(name, revision, **environment)
        return answer["exit_code"], str(answer["message"])


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with serve({**WANTED, **UNWANTED}) as hub:
        yield Place(hub, tmp_path / "home")


def test_a_hub_name_downloads_only_what_is_needed_and_records_the_commit(place: Place) -> None:
    place.home.mkdir()
    answer = place.locate(HF_TOKEN="hf_secret")
    directory = Path(str(answer["directory"]))
    assert answer["name"] == REPO and answer["revision"] == COMMIT
    assert directory.is_relative_to(place.home)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == WANTED
    assert sorted(place.hub.downloads()) == sorted(WANTED)
    assert not [line for line in place.hub.asked if "/original/" in line or "/metal/" in line]
    assert place.hub.tokens == {"Bearer hf_secret"}
    before = len(place.hub.downloads())
    assert place.locate(HF_HUB_OFFLINE="1") == answer
    assert place.locate(revision=COMMIT) == answer
    assert len(place.hub.downloads()) == before


def test_an_interrupted_download_resumes(place: Place) -> None:
    place.home.mkdir()
    shard = "model-00002-of-00002.safetensors"
    place.hub.break_file = shard
    code, message = place.failure()
    assert code == 5
    assert "broke off" in message and "run the same command again" in message
    done = set(place.hub.downloads()) - {shard}
    assert done
    code, message = place.failure(HF_HUB_OFFLINE="1")  # what is there is not taken for the whole
    assert code == 5 and "not completely" in message
    place.hub.break_file = None
    place.hub.asked.clear()
    directory = Path(str(place.locate()["directory"]))
    assert (directory / shard).read_bytes() == WANTED[shard]
    assert shard in place.hub.downloads()
    kept = {path.name for path in directory.iterdir()} - set(place.hub.downloads())
    assert kept  # files of the first attempt were not fetched again


def test_refusals_of_the_hub_are_named(place: Place) -> None:
    place.home.mkdir()
    code, message = place.failure("openai/gpt-oss-20bb")
    assert code == 3 and "no repository openai/gpt-oss-20bb" in message and "did you mean openai/gpt-oss-20b" in message
    code, message = place.failure(revision="v9")
    assert code == 3 and "no revision 'v9'" in message
    place.hub.status = 401
    code, message = place.failure()
    assert code == 3 and "HTTP 401" in message and "HF_TOKEN" in message
    place.hub.status, place.hub.error_code = 403, "GatedRepo"
    code, message = place.failure()
    assert code == 3 and "gated" in message and "HTTP 403" in message
    place.hub.status, place.hub.error_code = 403, None
    code, message = place.failure()
    assert code == 3 and "HTTP 403" in message and "HF_TOKEN" in message


def test_no_network_and_offline_are_named(place: Place) -> None:
    place.home.mkdir()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    code, message = place.failure(HF_ENDPOINT=nobody)
    assert code == 5 and nobody in message and "could not be reached" in message
    code, message = place.failure(HF_HUB_OFFLINE="1")
    assert code == 5 and "HF_HUB_OFFLINE is set" in message
    assert not place.hub.asked


def test_a_directory_is_used_unchanged(tmp_path: Path) -> None:
    location = locate_base(str(tmp_path))
    assert (location.directory, location.revision) == (tmp_path, None)
    with pytest.raises(ConfigError, match=r"model\.revision=main"):
        locate_base(str(tmp_path), "main")


@pytest.mark.parametrize("path", ["./base/tiny", "/no/where", "a/b/c", "~/no-such-base", "base", "../x"])
def test_a_missing_local_path_does_not_ask_the_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no directory") as caught:
        locate_base(path)
    assert "finetune base tiny" in str(caught.value)


def test_a_misspelt_directory_gets_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base" / "tiny").mkdir(parents=True)
    with pytest.raises(InputError, match=r"did you mean base/tiny\?"):
        locate_base("base/tny")  # looks like a hub name, but base/ is a folder here
    with pytest.raises(InputError, match="did you mean the hub name openai/gpt-oss-120b"):
        locate_base("gpt-oss-120b")

"""The tokenizer that we build is the published one, and openai-harmony loads without a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from finetune.config.paths import shipped_dir
from finetune.data.harmony import tokenizer as tokenizer_module
from finetune.data.harmony.tokenizer import TOKENIZER_JSON_SHA256, harmony_encoding, rank_file, write_tokenizer
from finetune.errors import InputError

TEXTS = [
    "The Licensee shall indemnify, hold harmless and defend the Licensor.",
    "  two leading blanks, a tab\tand\r\n\r\nblank lines   \n",
    "naïve café, Ærøskøbing, 東京都, привет, مرحبا, हिन्दी, 👩‍👩‍👧‍👦",
    "1234567890 3.14159 0x7fff I'll they've SHE'LL CamelCaseWord HTTPServer",
    "\x00\x7f\u00ad\u200b",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "new" / "folder"
    write_tokenizer(directory)
    return directory


def test_tokenizer_json_is_byte_identical_to_the_published_file(directory: Path) -> None:
    content = (directory / "tokenizer.json").read_bytes()
    assert len(content) == 27_868_174
    assert hashlib.sha256(content).hexdigest() == TOKENIZER_JSON_SHA256
    assert sorted(path.name for path in directory.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_encodes_as_openai_harmony_does(directory: Path) -> None:
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == harmony_encoding().encode(text, disallowed_special=())
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_transformers_reads_the_directory(directory: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(directory)
    assert len(loaded) == 200_019
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (199_998, 200_002, 199_999)
    assert loaded.convert_tokens_to_ids("<|start|>") == tokenizer_module.START_ID


def test_a_damaged_rank_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(rank_file().read_bytes())
    content[1000] ^= 1
    damaged = tmp_path / "o200k_base.tiktoken"
    damaged.write_bytes(content)
    monkeypatch.setattr(tokenizer_module, "rank_file", lambda: damaged)
    with pytest.raises(InputError, match="damaged"):
        write_tokenizer(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "TIKTOKEN_ENCODINGS_BASE"}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=False
    )


LOAD = "import os; from finetune.data.harmony.tokenizer import harmony_encoding; print(harmony_encoding().name)"


def test_harmony_leaves_the_environment_as_it_was() -> None:
    result = run_python(LOAD + "; print('TIKTOKEN_ENCODINGS_BASE' in os.environ)")
    assert result.stdout.split() == ["HarmonyGptOss", "False"], result.stderr


def test_harmony_uses_the_users_directory_and_names_it_when_wrong(tmp_path: Path) -> None:
    (tmp_path / "o200k_base.tiktoken").write_bytes(b"IQ== 0\n")
    code = f"""
from finetune.errors import MachineError
try:
    {LOAD.replace("; ", chr(10) + "    ")}
except MachineError as error:
    print(error)
"""
    result = run_python(code, TIKTOKEN_ENCODINGS_BASE=str(tmp_path))
    assert str(tmp_path) in result.stdout, result.stderr
    assert "unset TIKTOKEN_ENCODINGS_BASE" in result.stdout


def test_shipped_examples_are_what_the_licence_file_says() -> None:
    import gzip

    licences = (shipped_dir("data") / "LICENSES.md").read_text()
    files = [path for path in shipped_dir("data").rglob("*") if path.suffix in (".gz", ".json", ".tiktoken")]
    assert len(files) == 14
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert hashlib.sha256(content).hexdigest() in licences, path
    assert sum(path.stat().st_size for path in files) < 15e6

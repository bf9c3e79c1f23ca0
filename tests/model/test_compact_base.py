"""The pretrained tiny base: its compact form, and the agreement of the shipped file with its card."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.arch import EMBEDDING, OUTPUT_HEAD
from finetune.config.paths import shipped_dir
from finetune.config.schema import DataConfig
from finetune.data.forms import parse_conversation
from finetune.data.harmony.render import Example, render_example
from finetune.data.sources import Record
from finetune.errors import MachineError
from finetune.evaluate.likelihood import held_out_loss
from finetune.model import tiny
from finetune.model.build import build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.tiny import COMPACT_FILE, CompactBase, shipped_compact_base, write_tiny_base

CARD = (shipped_dir("data") / "base" / "README.md").read_text()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The shipped base, expanded; its tokenizer is copied, since building one takes seconds."""

    def copy_tokenizer(directory: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(tiny_base / name, directory / name)

    directory = tmp_path_factory.mktemp("bases") / "pretrained"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.data.harmony.tokenizer.write_tokenizer", copy_tokenizer)
        write_tiny_base(directory)
    return directory


def small(seed: int = 0) -> CompactBase:
    generator = torch.Generator().manual_seed(seed)
    embedding, rest = torch.randn(6, 32, generator=generator), torch.randn(32, generator=generator)
    others = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    return CompactBase({"hidden_size": 32}, torch.tensor([1, 4, 5, 9, 30, 99]), embedding, rest, 0.25, others)


def test_compact_form_keeps_everything_to_eight_bits() -> None:
    made, read = small(), CompactBase.from_bytes(small().to_bytes())
    assert read.sizes == made.sizes and read.head_gain == made.head_gain
    assert torch.equal(read.tokens, made.tokens)
    assert torch.equal(read.rest, made.rest) and read.others.keys() == made.others.keys()
    assert all(torch.equal(read.others[name], made.others[name]) for name in made.others)
    largest = made.embedding.abs().amax(1, keepdim=True)
    assert bool(((read.embedding - made.embedding).abs() <= largest / 254 * 1.001).all())
    assert made.to_bytes() == small().to_bytes() != small(1).to_bytes()


def test_expanding_gives_every_other_token_its_own_row() -> None:
    base = small()
    tensors = base.expand(4000, seed=0)
    embedding, head = tensors[EMBEDDING].float(), tensors[OUTPUT_HEAD].float()
    torch.testing.assert_close(embedding[base.tokens], base.embedding, atol=0.02, rtol=0.01)
    torch.testing.assert_close(head[base.tokens], base.embedding * 0.25, atol=0.01, rtol=0.01)
    others = torch.tensor([token for token in range(4000) if token not in base.tokens.tolist()])
    assert len(head[others].unique(dim=0)) == len(others)
    noise = head[others] - base.rest * 0.25
    assert abs(noise.mean()) < 0.01 and abs(noise.std() / (tiny.HEAD_NOISE / 32) - 1) < 0.02
    again, other = base.expand(4000, seed=0), base.expand(4000, seed=1)
    assert torch.equal(again[OUTPUT_HEAD], tensors[OUTPUT_HEAD])
    changed = (other[OUTPUT_HEAD] != tensors[OUTPUT_HEAD]).any(1).nonzero()[:, 0]
    assert not set(changed.tolist()) & set(base.tokens.tolist()) and len(changed) == len(others)


@pytest.mark.parametrize("content", [b"", b"not gzip", small().to_bytes()[:-50], None])
def test_a_damaged_file_is_named(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "shipped_dir", lambda _: tmp_path)
    (tmp_path / "base").mkdir()
    if content is not None:
        (tmp_path / COMPACT_FILE).write_bytes(content)
    with pytest.raises(MachineError, match=r"tiny\.safetensors\.gz cannot be read"):
        shipped_compact_base()


def test_the_shipped_file_is_small_and_matches_its_card() -> None:
    content = (shipped_dir("data") / COMPACT_FILE).read_bytes()
    assert hashlib.sha256(content).hexdigest() in CARD
    assert len(content) < 8e6
    assert sum(path.stat().st_size for path in shipped_dir("data").rglob("*") if path.is_file()) < 15e6
    for attribution in ("CUAD v1, The Atticus Project, CC BY 4.0", "PubMedQA", "Jane Austen", "Arthur Conan Doyle"):
        assert attribution in CARD


def test_the_same_bytes_on_every_machine(pretrained: Path) -> None:
    """The identity that the card names; a change of it is a new base for everyone who trained on the old one."""
    sums = json.loads((pretrained / "checksums.json").read_text())["files"]
    shards = sorted(name for name in sums if name.endswith(".safetensors"))
    assert len(shards) == 3
    for shard in shards:
        assert sums[shard] in CARD
    readme = (pretrained / "README.md").read_text()
    assert "Pretrained" in readme and "](../" not in readme
    for attribution in ("CUAD v1, The Atticus Project, CC BY 4.0", "PubMedQA", "Jane Austen", "Arthur Conan Doyle"):
        assert attribution in readme.partition("## Attribution")[2]


def clauses(split: str, count: int) -> list[Example]:
    """Contract clauses as plain documents."""
    config = DataConfig(train={}, max_length=2048)
    samples = []
    with gzip.open(shipped_dir("data") / "legal" / "cuad_clause_type.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["split"] == split and len(samples) < count:
                text = row["messages"][1]["content"].rpartition("Clause:\n")[2]
                samples.append(render_example(Record(row["id"], "", parse_conversation({"text": text})), config))
    return samples


def test_it_models_held_out_text_better_than_word_frequencies(pretrained: Path) -> None:
    """Validation clauses against a unigram model of the training clauses, both over all 201,088 tokens."""
    held_out = clauses("val", 60)
    counts = np.full(201_088, 0.1)
    for sample in clauses("train", 5000):
        np.add.at(counts, sample.ids, 1)
    nll = -np.log(counts / counts.sum())
    unigram = float(np.concatenate([nll[sample.ids[1:]] for sample in held_out]).mean())
    base = build_base(Checkpoint.open(pretrained), torch.device("cpu"), torch.float32, 8)
    assert held_out_loss(base.model, held_out, 2048).mean < unigram - 1.0

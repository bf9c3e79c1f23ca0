"""The constructed base of the benchmarks' controls: embeddings from co-occurrence, everything else random."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from finetune.model.checkpoint import Checkpoint
from finetune.model.identity import verify_checksums

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from constructed_base import write_constructed_base
from pretraining.semantics import semantic_embeddings


@pytest.fixture(scope="module")
def constructed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The base of seed 0; its tokenizer is copied, since building one takes seconds."""

    def copy_tokenizer(directory: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(tiny_base / name, directory / name)

    directory = tmp_path_factory.mktemp("bases") / "constructed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.data.harmony.tokenizer.write_tokenizer", copy_tokenizer)
        write_constructed_base(directory, seed=0)
    return directory


def test_only_embeddings_differ_from_the_random_base(constructed: Path, tiny_base: Path) -> None:
    ours, random = Checkpoint.open(constructed), Checkpoint.open(tiny_base)
    changed = [name for name in ours.names() if not torch.equal(ours.read(name), random.read(name))]
    assert changed == ["model.embed_tokens.weight"]
    assert verify_checksums(ours) and "Constructed, not pretrained" in (constructed / "README.md").read_text()


def test_constructed_embeddings_put_like_words_together_and_random_ones_do_not(
    constructed: Path, tiny_base: Path
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(constructed / "tokenizer.json"))
    words = [" insurance", " royalty", " terminate", " audit"]
    alike = list(zip(words, [" coverage", " royalties", " termination", " records"], strict=True))
    apart = list(zip(words, [" laws", " audit", " royalty", " renew"], strict=True))

    def similarity(directory: Path, pairs: list[tuple[str, str]]) -> float:
        rows = Checkpoint.open(directory).read("model.embed_tokens.weight").float()
        ids = torch.tensor([[tokenizer.encode(word).ids for word in pair] for pair in pairs])[..., 0]
        return float(torch.cosine_similarity(rows[ids[:, 0]], rows[ids[:, 1]]).mean())

    assert similarity(constructed, alike) > similarity(constructed, apart) + 0.3
    assert abs(similarity(tiny_base, alike)) < 0.3


def test_semantic_embeddings_on_two_topics() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [
        (torch.randint(0, 40, (50,), generator=generator) + topic * 40).tolist() for topic in (0, 1) for _ in range(40)
    ]
    tokens, embeddings = semantic_embeddings(texts, 8, seed=0)
    assert tokens.tolist() == list(range(80))
    first, second = embeddings[:40], embeddings[40:]
    within = torch.cosine_similarity(first[:, None], first[None], dim=-1).mean()
    across = torch.cosine_similarity(first[:, None], second[None], dim=-1).mean()
    assert within > across + 0.3
    assert torch.allclose(embeddings.square().mean(1), torch.ones(80, dtype=torch.float64))

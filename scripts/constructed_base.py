"""Write a tiny base that was constructed, not pretrained: a control trained on no sentence.

    python scripts/constructed_base.py DIRECTORY [--seed 0]

Token embeddings come from latent semantic analysis of the shipped contract clauses (labels unused); everything else is
the random base of the same seed. bench/compare.py, bench/bf16_lora.py and scripts/measure_tiny.py compare with it.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from pretraining.semantics import semantic_embeddings
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from finetune.arch import EMBEDDING
from finetune.config.paths import shipped_dir
from finetune.model.checkpoint import INDEX_FILE
from finetune.model.tiny import ATTRIBUTION, write_checksums, write_tiny_base

CORPUS = "legal/cuad_clause_type.jsonl.gz"
_CLAUSE_MARK = "Clause:\n"
_EMBEDDING_SCALE = 1.0  # 0.25 learnt more slowly: 1.58 against 1.37, measured as in semantics.py with a window of 8
_README = f"""# A constructed tiny base in gpt-oss's file layout

Constructed, not pretrained: token embeddings come from latent semantic analysis of contract clauses, everything else
from a random seed. Written by scripts/constructed_base.py.

{ATTRIBUTION}
CUAD v1, The Atticus Project, CC BY 4.0 (<https://creativecommons.org/licenses/by/4.0/>). Changed: the training split's
clauses without their labels, made into token embeddings.
"""


def write_constructed_base(directory: Path, *, seed: int = 0) -> None:
    """Write the base into a directory that does not exist or is empty.

    The same seed gives the same bytes with the same torch build (the embeddings go through LAPACK).
    """
    write_tiny_base(directory, seed=seed, kind="random")
    shard = directory / json.loads((directory / INDEX_FILE).read_text())["weight_map"][EMBEDDING]
    tensors = load_file(shard)
    hidden = tensors[EMBEDDING].shape[1]
    tokens, values = semantic_embeddings(list(_clauses(directory)), hidden, seed)
    tensors[EMBEDDING][tokens] = (_EMBEDDING_SCALE * values).to(torch.bfloat16)
    save_file(tensors, shard, metadata={"format": "pt"})
    shard.chmod(0o644)  # safetensors writes for the owner only
    (directory / "README.md").write_text(_README, encoding="utf-8")
    write_checksums(directory)


def _clauses(directory: Path) -> Iterator[list[int]]:
    """Token ids of the training split's clauses, without their labels or the instructions around them."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = []
    with gzip.open(shipped_dir("data") / CORPUS, "rt", encoding="utf-8") as file:
        for record in map(json.loads, file):
            if record["split"] == "train":
                user = next(message["content"] for message in record["messages"] if message["role"] == "user")
                texts.append(user.partition(_CLAUSE_MARK)[2])
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        yield encoding.ids


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_constructed_base(arguments.directory, seed=arguments.seed)

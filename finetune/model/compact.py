"""The pretrained tiny base in a few megabytes: written by `scripts/pretrain_tiny.py`, expanded by `finetune base tiny`.

Of the 201,088 rows of the embedding and of the head only those of tokens that the corpus holds were trained. The
compact file has them as int8 with one scale a row; every other token, the *rest*, gets one common row plus noise of its
own, so that fine-tuning can tell such tokens apart. The head is the embedding times one number: both were trained as
one. Experts are the checkpoint's own MXFP4 bytes, everything else is bfloat16.

Expanding uses elementwise float32 arithmetic and the raw output of numpy's PCG64 (which never changes), so that the
same file and seed give the same bytes on any machine.

Shape suffixes: C tokens of the corpus, V all tokens, D hidden.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from finetune.config.locate import shipped_dir
from finetune.errors import MachineError

COMPACT_FILE = Path("base") / "tiny.safetensors.gz"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEAD_NOISE = 20.0
"""Of the rest's head rows, times 1 / D. A final hidden state has norm sqrt(D): this lets it lift any one by 20 nats."""
EMBEDDING_NOISE = 0.5
"""Of the rest's embedding rows, as a share of the RMS of all trained ones."""
_TOKENS, _ROWS, _SCALES, _REST = "tokens", "embedding.rows", "embedding.scales", "embedding.rest"
_FACTS = "base"
_UNIFORM_STEPS = 127 / 3**0.5  # int8 noise divided by this has a standard deviation of about 1


@dataclass(frozen=True, eq=False)
class CompactBase:
    """What was trained.

    Attributes:
        sizes: the keys of config.json in which it differs from the published 20b's.
        tokens: int64 [C], ids of the trained rows, ascending.
        embedding: float32 [C, D].
        rest: float32 [D], the row that stands for all other tokens.
        head_gain: the head's rows are the embedding's times this.
        others: every other tensor of the checkpoint by its name, as it is stored there.
    """

    sizes: dict[str, Any]
    tokens: Tensor
    embedding: Tensor
    rest: Tensor
    head_gain: float
    others: dict[str, Tensor]

    def to_bytes(self) -> bytes:
        """The compact file's content; embeddings are rounded to 8 bits a number."""
        scales = (self.embedding.abs().amax(1) / 127).clamp_min(1e-12)
        tensors = {
            _TOKENS: self.tokens.to(torch.int32),
            _ROWS: torch.round(self.embedding / scales[:, None]).to(torch.int8),
            _SCALES: scales.float(),
            _REST: self.rest.float(),
            **self.others,
        }
        # One entry: safetensors writes several in an order that changes from run to run.
        metadata = {_FACTS: json.dumps({"sizes": self.sizes, "head_gain": self.head_gain})}
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return gzip.compress(save(plain, metadata), compresslevel=9, mtime=0)

    @classmethod
    def from_bytes(cls, content: bytes) -> CompactBase:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: something else stands there.
        """
        try:
            plain = gzip.decompress(content)
            header = json.loads(plain[8 : 8 + int.from_bytes(plain[:8], "little")])["__metadata__"]
            tensors = load(plain)
            facts = json.loads(header[_FACTS])
            sizes, head_gain = facts["sizes"], float(facts["head_gain"])
            tokens, rows = tensors.pop(_TOKENS), tensors.pop(_ROWS)
            scales, rest = tensors.pop(_SCALES), tensors.pop(_REST)
        except (OSError, EOFError, KeyError, SafetensorError) as error:
            raise ValueError(f"not a compact base: {error}") from error
        return cls(sizes, tokens.long(), rows.float() * scales[:, None], rest, head_gain, tensors)

    def expand(self, vocabulary: int, seed: int) -> dict[str, Tensor]:
        """Every tensor of the checkpoint by name.

        Args:
            vocabulary: V.
            seed: of the rest's noise.
        """
        hidden = len(self.rest)
        noise = _uniform_noise(2 * vocabulary * hidden, seed).view(2, vocabulary, hidden)
        rms = float(self.embedding.square().mean().sqrt())
        embedding = self.rest + noise[0] * (EMBEDDING_NOISE * rms)
        head = self.rest * self.head_gain + noise[1] * (HEAD_NOISE / hidden)
        embedding[self.tokens] = self.embedding
        head[self.tokens] = self.embedding * self.head_gain
        return {**self.others, EMBEDDING: embedding.to(torch.bfloat16), HEAD: head.to(torch.bfloat16)}


def shipped_compact_base() -> CompactBase:
    """The pretrained base that ships with the toolkit (data/base/README.md has its card).

    Raises:
        MachineError: its file is missing or damaged.
    """
    path = shipped_dir("data") / COMPACT_FILE
    try:
        return CompactBase.from_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MachineError(
            f"{path} cannot be read",
            why=str(error),
            fix="reinstall gpt-oss-finetune, or make another kind: `finetune base tiny DIR --kind constructed`",
        ) from error


def _uniform_noise(count: int, seed: int) -> Tensor:
    """float32 [count] of mean 0 and standard deviation 1, whole multiples of one number between -1.74 and 1.73."""
    words = np.random.PCG64(seed).random_raw((count + 7) // 8)
    numbers = torch.from_numpy(np.asarray(words, dtype="<u8").view(np.int8)[:count])
    return numbers.float() / _UNIFORM_STEPS

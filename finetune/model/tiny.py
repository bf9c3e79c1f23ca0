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
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from finetune.arch import Arch
from finetune.config.paths import shipped_dir
from finetune.errors import ConfigError, MachineError
from finetune.files import staged_directory
from finetune.model.checkpoint import CHECKSUMS_FILE, CONFIG_FILE, INDEX_FILE
from finetune.model.semantics import semantic_embeddings
from finetune.mxfp4.format import quantise

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


# Write a small gpt-oss checkpoint in the published file layout, so that the whole job runs on two CPU cores.
#
# Its tensors have the names, dtypes and orientation of openai/gpt-oss-20b's; only the sizes differ. `pretrained`
# expands the weights that ship with the toolkit. The other kinds were never trained: `constructed` embeddings come from
# which tokens occur together in the shipped contract clauses (labels unused), and all the rest, like everything in a
# `random` base, is drawn from the seed.

Kind = Literal["pretrained", "constructed", "random"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# hidden != expert width: a transposed expert tensor then has the wrong shape, which it has not in the real models.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
}
ATTRIBUTION = "## Attribution"
"""Heading in a base's README.md of what has to go with every model made from it (finetune/export/card.py)."""
CORPUS = "legal/cuad_clause_type.jsonl.gz"
_CLAUSE_MARK = "Clause:\n"
_EMBEDDING_SCALE = 1.0  # 0.25 learnt more slowly: 1.58 against 1.37, measured as in semantics.py with a window of 8
_UNSEEN_EMBEDDING_STD = 0.02
# A final hidden state has norm sqrt(H). With the usual 0.02 no logit could rise above the 201,087 others; 20 / H can.
_HEAD_GAIN = 20.0


def write_tiny_base(
    directory: Path, *, seed: int = 0, kind: Kind = "pretrained", compact: CompactBase | None = None
) -> None:
    """Write the checkpoint, whole or not at all: it is made beside `directory` and moved there when complete.

    The same seed gives the same bytes: of a pretrained base on any machine, of the others with the same torch build
    (constructed embeddings go through LAPACK).

    Args:
        directory: where it goes; must not exist or be empty.
        seed: of every random number; of a pretrained base, of the rows of tokens that it was not trained on.
        kind: see the module.
        compact: of a pretrained base, the weights to expand instead of the shipped ones.

    Raises:
        ConfigError: `directory` exists and is not an empty directory.
        MachineError: the shipped data are missing.
    """
    from finetune.data.harmony.tokenizer import write_tokenizer

    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ConfigError(
            f"{directory} already exists and is not an empty directory",
            why="nothing is ever overwritten",
            fix=f"give another name, or remove it first: rm -r {directory}",
        )
    with staged_directory(directory, "a base", unique=True) as staging:
        write_tokenizer(staging)
        if kind == "pretrained":
            compact = compact or shipped_compact_base()
        config = _write_configs(staging, compact.sizes if compact else SIZES)
        shape = Arch.from_config(config, str(staging / CONFIG_FILE))
        if compact:
            tensors = compact.expand(shape.vocab_size, seed)
        else:
            tensors = _tensors(shape, staging, seed, kind == "constructed")
        _write_shards(staging, {name: tensors[name] for name in shape.expected_tensors()}, shape)
        (staging / "README.md").write_text(_readme(seed, kind), encoding="utf-8")
        _write_checksums(staging)


def _write_configs(directory: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """config.json and generation_config.json: the published 20b's with other sizes."""
    published = shipped_dir("data") / "tokenizer" / "gpt-oss-20b"
    config: dict[str, Any] = json.loads((published / CONFIG_FILE).read_text(encoding="utf-8"))
    config.update(sizes)
    _write_json(directory / CONFIG_FILE, config)
    shutil.copyfile(published / "generation_config.json", directory / "generation_config.json")
    return config


def _tensors(shape: Arch, directory: Path, seed: int, constructed: bool) -> dict[str, torch.Tensor]:
    """All tensors by name, in `expected_tensors` order."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (dtype, sizes) in shape.expected_tensors().items():
        if name.endswith("_scales"):
            continue  # written with its blocks
        if name.endswith("_blocks"):
            experts, out_size, groups, _ = sizes
            weights = torch.randn(experts, out_size, groups * 32, generator=generator) * (groups * 32) ** -0.5
            blocks, scales = quantise(weights)
            tensors[name], tensors[name.removesuffix("_blocks") + "_scales"] = blocks, scales
        else:
            assert dtype == "BF16"
            tensors[name] = _random_tensor(name, sizes, generator).to(torch.bfloat16)
    if constructed:
        embeddings = tensors["model.embed_tokens.weight"]
        tokens, values = semantic_embeddings(list(_clauses(directory)), shape.hidden, seed)
        embeddings[tokens] = (_EMBEDDING_SCALE * values).to(torch.bfloat16)
    return tensors


def _random_tensor(name: str, sizes: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(sizes, generator=generator)
    if name == "model.embed_tokens.weight":
        return noise * _UNSEEN_EMBEDDING_STD
    if name == "lm_head.weight":
        return noise * (_HEAD_GAIN / sizes[1])
    if name.endswith("norm.weight"):
        return 1 + 0.05 * noise  # not exactly 1, so that a norm without its weight shows in a comparison
    if name.endswith("sinks"):
        return noise
    if name.endswith("bias"):
        return 0.02 * noise
    return noise * sizes[-1] ** -0.5


def _clauses(directory: Path) -> Iterator[list[int]]:
    """Token ids of the training split's clauses, without their labels or the instructions around them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = []
    with gzip.open(shipped_dir("data") / CORPUS, "rt", encoding="utf-8") as file:
        for record in map(json.loads, file):
            if record["split"] == "train":
                user = next(message["content"] for message in record["messages"] if message["role"] == "user")
                texts.append(user.partition(_CLAUSE_MARK)[2])
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        yield encoding.ids


def _write_shards(directory: Path, tensors: dict[str, torch.Tensor], shape: Arch) -> None:
    """Three shards, cut before the second layer and before the head, and the index."""
    names = list(tensors)
    second_layer = next(number for number, name in enumerate(names) if name.startswith("model.layers.1."))
    cuts = [0, second_layer, names.index("lm_head.weight"), len(names)]
    weight_map: dict[str, str] = {}
    for number, (start, end) in enumerate(pairwise(cuts), start=1):
        shard = f"model-{number:05d}-of-{len(cuts) - 1:05d}.safetensors"
        save_file({name: tensors[name] for name in names[start:end]}, directory / shard, metadata={"format": "pt"})
        (directory / shard).chmod(0o644)  # safetensors writes for the owner only
        weight_map.update(dict.fromkeys(names[start:end], shard))
    index = {"metadata": {"total_size": shape.num_bytes()}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / INDEX_FILE, index)


def _write_checksums(directory: Path) -> None:
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
    _write_json(directory / CHECKSUMS_FILE, {"algorithm": "sha256", "files": files})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_ORIGINS: dict[Kind, str] = {
    "pretrained": """\
Pretrained on small texts within about an hour of processor time: contract clauses, PubMed abstracts and fiction, all
without labels. Its card, with figures and limits, is data/base/README.md in the toolkit. What it writes is no medical
and no legal advice.""",
    "constructed": """\
Constructed, not pretrained: token embeddings come from latent semantic analysis of contract clauses, everything else
from a random seed.""",
    "random": "Random, not pretrained: every weight comes from a random seed.",
}
_CONSTRUCTED_FROM = """\
CUAD v1, The Atticus Project, CC BY 4.0 (<https://creativecommons.org/licenses/by/4.0/>). Changed: the training split's
clauses without their labels, made into token embeddings."""


def _attribution(kind: Kind) -> str:
    """Whose texts are in the weights: a section that model cards of whatever is trained on the base carry on."""
    if kind == "random":
        return ""
    if kind == "constructed":
        return f"\n{ATTRIBUTION}\n{_CONSTRUCTED_FROM}\n"
    card = (shipped_dir("data") / COMPACT_FILE.parent / "README.md").read_text(encoding="utf-8")
    return f"\n{ATTRIBUTION}\n{card.partition(ATTRIBUTION)[2].partition(chr(10) + '## ')[0].strip()}\n"


def _readme(seed: int, kind: Kind) -> str:
    return f"""# A tiny base in gpt-oss's file layout

{_ORIGINS[kind]}

It cannot converse or reason. It exists so that the toolkit's whole path (native MXFP4 experts, harmony, LoRA, export,
read-back) runs on a CPU with the code that runs on openai/gpt-oss-20b. The tokenizer is the real one.

Made by `finetune base tiny --kind {kind} --seed {seed}`. `checksums.json` lists every file's sha256.
{_attribution(kind)}"""

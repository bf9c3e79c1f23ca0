"""Tiny bases: a small gpt-oss checkpoint in the published file layout, so that everything runs on two CPU cores.

The tensors have the names, dtypes and orientation of openai/gpt-oss-20b's; only the dims differ. A `pretrained` base
expands the weights that ship with the toolkit, a `random` one is drawn from the seed.

The shipped weights are a few megabytes, written by `scripts/pretrain_tiny.py`. Of the 201,088 rows of the embedding and
of the output head only those of the corpus's tokens were trained. The compact file has them as int8 with one scale per
row; every other token, the *rest*, gets one common row plus noise of its own, so that fine-tuning can tell such tokens
apart. The head is the embedding times one number: both were trained as one. Experts are the checkpoint's own MXFP4
bytes, everything else is bfloat16. Expanding uses elementwise float32 arithmetic and the raw output of numpy's PCG64
(which never changes), so that the same file and seed give the same bytes on any machine.

Shape suffixes: C tokens of the corpus, V all tokens, D hidden.
"""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from finetune.arch import EMBEDDING, OUTPUT_HEAD, Arch
from finetune.config.paths import shipped_dir
from finetune.errors import ConfigError, MachineError
from finetune.files import sha256_of, staged_directory, write_json
from finetune.model.checkpoint import CHECKSUMS_FILE, CONFIG_FILE, INDEX_FILE, ConfigJson
from finetune.mxfp4.format import quantise

Kind = Literal["pretrained", "random"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Sizes = dict[str, int | list[str]]
"""Keys of config.json in which a tiny base differs from the published 20b."""
# hidden != expert width: a transposed expert tensor then has the wrong shape, which it has not in the real models.
SIZES: Sizes = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
}
"""Of a random base."""
ATTRIBUTION = "## Attribution"
"""Heading in a base's README.md of what has to go with every model made from it (finetune/export/card.py)."""
COMPACT_FILE = Path("base") / "tiny.safetensors.gz"
HEAD_NOISE = 20.0
"""Of the rest's head rows, times 1 / D. A final hidden state has norm sqrt(D): this lets it raise any logit by 20."""
EMBEDDING_NOISE = 0.5
"""Of the rest's embedding rows, as a share of the RMS of all trained ones."""
_TOKENS, _ROWS, _SCALES, _REST = "tokens", "embedding.rows", "embedding.scales", "embedding.rest"
_METADATA = "base"
_UNIFORM_STEPS = 127 / 3**0.5  # int8 noise divided by this has a standard deviation of about 1
_RANDOM_EMBEDDING_STD = 0.02
# A final hidden state has norm sqrt(D). With the usual 0.02 no logit could rise above the 201,087 others; 20 / D can.
_RANDOM_HEAD_GAIN = 20.0


@dataclass(frozen=True, eq=False)
class CompactBase:
    """The weights of a pretrained tiny base that were trained.

    Attributes:
        sizes: the keys of config.json in which it differs from the published 20b's.
        tokens: int64 [C], ids of the trained rows, ascending.
        embedding: float32 [C, D].
        rest: float32 [D], the common row of all other tokens.
        head_gain: the head's rows are the embedding's times this.
        others: every other tensor of the checkpoint by its name, as it is stored there.
    """

    sizes: Sizes
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
        metadata = {_METADATA: json.dumps({"sizes": self.sizes, "head_gain": self.head_gain})}
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return gzip.compress(save(plain, metadata), compresslevel=9, mtime=0)

    @classmethod
    def from_bytes(cls, content: bytes) -> CompactBase:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: the content is something else.
        """
        try:
            plain = gzip.decompress(content)
            header = json.loads(plain[8 : 8 + int.from_bytes(plain[:8], "little")])["__metadata__"]
            tensors = load(plain)
            description = json.loads(header[_METADATA])
            sizes, head_gain = description["sizes"], float(description["head_gain"])
            tokens, rows = tensors.pop(_TOKENS), tensors.pop(_ROWS)
            scales, rest = tensors.pop(_SCALES), tensors.pop(_REST)
        except (OSError, EOFError, KeyError, SafetensorError) as error:
            raise ValueError(f"not a compact base: {error}") from error
        return cls(sizes, tokens.long(), rows.float() * scales[:, None], rest, head_gain, tensors)

    def expand(self, vocabulary: int, seed: int) -> dict[str, Tensor]:
        """Every tensor of the checkpoint by name.

        Args:
            vocabulary: V.
            seed: of the noise on the rest.
        """
        hidden = len(self.rest)
        noise = _uniform_noise(2 * vocabulary * hidden, seed).view(2, vocabulary, hidden)
        rms = float(self.embedding.square().mean().sqrt())
        embedding = self.rest + noise[0] * (EMBEDDING_NOISE * rms)
        head = self.rest * self.head_gain + noise[1] * (HEAD_NOISE / hidden)
        embedding[self.tokens] = self.embedding
        head[self.tokens] = self.embedding * self.head_gain
        return {**self.others, EMBEDDING: embedding.to(torch.bfloat16), OUTPUT_HEAD: head.to(torch.bfloat16)}


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
            fix="reinstall gpt-oss-finetune, or make another kind: `finetune base tiny DIR --kind random`",
        ) from error


def _uniform_noise(count: int, seed: int) -> Tensor:
    """float32 [count] of mean 0 and standard deviation 1: multiples of one number, from -1.74 to 1.73."""
    words = np.random.PCG64(seed).random_raw((count + 7) // 8)
    numbers = torch.from_numpy(np.asarray(words, dtype="<u8").view(np.int8)[:count])
    return numbers.float() / _UNIFORM_STEPS


def write_tiny_base(
    directory: Path, *, seed: int = 0, kind: Kind = "pretrained", compact: CompactBase | None = None
) -> None:
    """Write a tiny base, whole or not at all.

    The same seed gives the same bytes: of a pretrained base on any machine, of a random one with the same torch build.

    Args:
        directory: must not exist or be empty.
        seed: of every random number; of a pretrained base, of the rows of tokens that it was not trained on.
        kind: see the module.
        compact: of a pretrained base, the weights to expand instead of the shipped ones.

    Raises:
        ConfigError: `directory` exists and is not an empty directory.
        MachineError: the shipped data are missing, or the base cannot be written.
    """
    from finetune.data.harmony.chat_template import TEMPLATE_FILE, chat_template
    from finetune.data.harmony.tokenizer import write_tokenizer

    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ConfigError(
            f"{directory} already exists and is not an empty directory",
            why="nothing is ever overwritten",
            fix=f"give another name, or remove it first: rm -r {directory}",
        )
    with staged_directory(directory, "the tiny base") as staging:
        write_tokenizer(staging)
        (staging / TEMPLATE_FILE).write_text(chat_template(), encoding="utf-8")
        if kind == "pretrained":
            compact = compact or shipped_compact_base()
        config = _write_configs(staging, compact.sizes if compact else SIZES)
        arch = Arch.from_config(config, str(staging / CONFIG_FILE))
        tensors = compact.expand(arch.vocab_size, seed) if compact else _random_tensors(arch, seed)
        _write_shards(staging, {name: tensors[name] for name in arch.expected_tensors()}, arch)
        (staging / "README.md").write_text(_readme(seed, kind), encoding="utf-8")
        write_checksums(staging)


def _write_configs(directory: Path, sizes: Sizes) -> ConfigJson:
    """Write config.json and generation_config.json: the published 20b's with other dims."""
    published = shipped_dir("data") / "tokenizer" / "gpt-oss-20b"
    config: ConfigJson = json.loads((published / CONFIG_FILE).read_text(encoding="utf-8"))
    config.update(sizes)
    write_json(directory / CONFIG_FILE, config)
    shutil.copyfile(published / "generation_config.json", directory / "generation_config.json")
    return config


def _random_tensors(arch: Arch, seed: int) -> dict[str, Tensor]:
    """All tensors of a random base by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (dtype, sizes) in arch.expected_tensors().items():
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
    return tensors


def _random_tensor(name: str, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(sizes, generator=generator)
    if name == EMBEDDING:
        return noise * _RANDOM_EMBEDDING_STD
    if name == OUTPUT_HEAD:
        return noise * (_RANDOM_HEAD_GAIN / sizes[1])
    if name.endswith("norm.weight"):
        return 1 + 0.05 * noise  # not exactly 1, so that a norm without its weight shows in a comparison
    if name.endswith("sinks"):
        return noise
    if name.endswith("bias"):
        return 0.02 * noise
    return noise * sizes[-1] ** -0.5


def _write_shards(directory: Path, tensors: dict[str, Tensor], arch: Arch) -> None:
    """Write three shards, cut before the second layer and before the head, and the index."""
    names = list(tensors)
    second_layer = next(number for number, name in enumerate(names) if name.startswith("model.layers.1."))
    cuts = [0, second_layer, names.index(OUTPUT_HEAD), len(names)]
    weight_map: dict[str, str] = {}
    for number, (start, end) in enumerate(pairwise(cuts), start=1):
        shard = f"model-{number:05d}-of-{len(cuts) - 1:05d}.safetensors"
        save_file({name: tensors[name] for name in names[start:end]}, directory / shard, metadata={"format": "pt"})
        (directory / shard).chmod(0o644)  # safetensors writes for the owner only
        weight_map.update(dict.fromkeys(names[start:end], shard))
    index = {"metadata": {"total_size": arch.num_bytes()}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX_FILE, index)


def write_checksums(directory: Path) -> None:
    """Write `checksums.json` with the SHA-256 of every other file of a checkpoint directory."""
    paths = [path for path in sorted(directory.iterdir()) if path.name != CHECKSUMS_FILE]
    files = {path.name: sha256_of(path) for path in paths}
    write_json(directory / CHECKSUMS_FILE, {"algorithm": "sha256", "files": files})


_ORIGINS: dict[Kind, str] = {
    "pretrained": """\
Pretrained on small texts within about an hour of processor time: contract clauses, PubMed abstracts and fiction, all
without labels. Its card, with figures and limits, is data/base/README.md in the toolkit. What it writes is no medical
and no legal advice.""",
    "random": "Random, not pretrained: every weight comes from a random seed.",
}


def _attribution(kind: Kind) -> str:
    """Sources of the texts in the weights: a section that model cards of whatever is trained on the base repeat."""
    if kind == "random":
        return ""
    card = (shipped_dir("data") / COMPACT_FILE.parent / "README.md").read_text(encoding="utf-8")
    return f"\n{ATTRIBUTION}\n{card.partition(ATTRIBUTION)[2].partition(chr(10) + '## ')[0].strip()}\n"


def _readme(seed: int, kind: Kind) -> str:
    return f"""# A tiny base in gpt-oss's file layout

{_ORIGINS[kind]}

It cannot converse or reason. It exists so that the toolkit's whole path (native MXFP4 experts, harmony, LoRA, export,
read-back) runs on a CPU with the code that runs on openai/gpt-oss-20b. The tokenizer is the real one.

Made by `finetune base tiny --kind {kind} --seed {seed}`. `checksums.json` lists every file's sha256.
{_attribution(kind)}"""

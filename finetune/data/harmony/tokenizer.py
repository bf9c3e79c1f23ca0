"""Build the published tokenizer from the shipped rank file, and load openai-harmony's encoding, without a network."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai_harmony import HarmonyEncoding, HarmonyEncodingName, HarmonyError, load_harmony_encoding
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from finetune import log
from finetune.config.paths import shipped_dir
from finetune.errors import CheckError, InputError, MachineError
from finetune.files import sha256_of
from finetune.records import parse_record, read_record

RANK_FILE_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
TOKENIZER_JSON_SHA256 = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"

START_ID, CHANNEL_ID, CONSTRAIN_ID, MESSAGE_ID = 200006, 200005, 200003, 200008
END_ID, CALL_ID, RETURN_ID = 200007, 200012, 200002
END_OF_TEXT_ID = PAD_ID = 199999
FIRST_CONTROL_ID = 199998
"""Ids from here on are control tokens; text is never encoded as one. Source: data/tokenizer/special_tokens.json."""
LONGEST_TOKEN_BYTES = 128
"""The most bytes of text that one token of o200k encodes: 128 spaces."""

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_FIX = "put the tokenizer.json there that was published with the base; `finetune base tiny DIR` writes it too"
_ENCODINGS_VARIABLE = "TIKTOKEN_ENCODINGS_BASE"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_PATTERN = "|".join(
    [
        _BEFORE_WORD + _UPPER + "*" + _LOWER + "+" + _CONTRACTIONS,
        _BEFORE_WORD + _UPPER + "+" + _LOWER + "*" + _CONTRACTIONS,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""The pattern by which o200k splits text before merging. Source: tiktoken, `openai_public.o200k_base`."""


def rank_file() -> Path:
    """Path of the shipped `o200k_base.tiktoken`."""
    return shipped_dir("data") / "tokenizer" / "o200k_base.tiktoken"


@functools.cache
def harmony_encoding() -> HarmonyEncoding:
    """Load OpenAI's harmony renderer with the shipped ranks, unless TIKTOKEN_ENCODINGS_BASE names another directory.

    The variable is set only while loading, so that child processes and other libraries see the user's environment.

    Raises:
        MachineError: the directory that the user's TIKTOKEN_ENCODINGS_BASE names does not have the right file.
    """
    users_directory = os.environ.get(_ENCODINGS_VARIABLE)
    os.environ[_ENCODINGS_VARIABLE] = users_directory or str(rank_file().parent)
    try:
        return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    except HarmonyError as error:
        raise MachineError(
            f"openai-harmony cannot load its vocabulary from {os.environ[_ENCODINGS_VARIABLE]}",
            why=str(error),
            fix=f"unset {_ENCODINGS_VARIABLE} to use the file shipped with the toolkit"
            if users_directory
            else "reinstall gpt-oss-finetune: its data files are incomplete",
        ) from error
    finally:
        if users_directory is None:
            del os.environ[_ENCODINGS_VARIABLE]
        else:
            os.environ[_ENCODINGS_VARIABLE] = users_directory


def write_tokenizer(directory: Path) -> None:
    """Write the published tokenizer files of gpt-oss into `directory`.

    `tokenizer.json` is built from the rank file and is byte-identical to openai/gpt-oss-20b's (27,868,174 bytes, about
    4 s); `tokenizer_config.json` and `special_tokens_map.json` are copied. The published `chat_template.jinja` is not
    shipped; finetune/data/harmony/chat_template.py writes our own.

    Args:
        directory: created if it does not exist; files of the same names are replaced.

    Raises:
        InputError: the shipped rank file is damaged.
        CheckError: the installed `tokenizers` writes other bytes than the published file.
    """
    text = _build_tokenizer().to_str(pretty=True).encode()
    digest = hashlib.sha256(text).hexdigest()
    if digest != TOKENIZER_JSON_SHA256:
        raise CheckError(
            f"the tokenizer.json built here is not the published one (sha256 {digest})",
            why="the installed `tokenizers` writes another format, or a shipped file was changed",
            fix="install the versions in constraints.txt",
        )
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / "tokenizer.json.part"
    unfinished.write_bytes(text)
    unfinished.replace(directory / "tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(rank_file().parent / "gpt-oss-20b" / name, directory / name)


@dataclass(frozen=True)
class _Bpe:
    vocab: dict[str, int]
    merges: list[Any]


@dataclass(frozen=True)
class _Added:
    content: str
    id: int
    special: bool = True


@dataclass(frozen=True)
class TokenizerFile:
    """The parts of a tokenizer.json that decide which text has which ids."""

    model: _Bpe
    added_tokens: list[_Added] = field(default_factory=list)
    normalizer: Any = None
    pre_tokenizer: Any = None


def read_tokenizer(path: Path) -> TokenizerFile:
    """Read a tokenizer.json.

    Raises:
        InputError: it is not a byte-level BPE's in the form of the `tokenizers` library.
    """
    return read_record(TokenizerFile, path, "a tokenizer.json", fix=TOKENIZER_FIX)


def tokenizer_differences(path: Path) -> list[str]:
    """Which parts of a tokenizer.json are not the published ones: [] if texts get the same ids.

    The published file is known by its SHA-256. Of another one the contents are compared (4 s): a file that transformers
    has written again has the same tokens.

    Raises:
        InputError: see `read_tokenizer`.
    """
    if sha256_of(path) == TOKENIZER_JSON_SHA256:
        return []
    found = read_tokenizer(path)
    ours = parse_record(TokenizerFile, json.loads(_build_tokenizer().to_str()), str(path))

    def merges(file: TokenizerFile) -> list[tuple[str, ...]]:
        return [tuple(pair.split(" ") if isinstance(pair, str) else map(str, pair)) for pair in file.model.merges]

    ids = {token.content: token.id for token in found.added_tokens}
    same = {
        "model.vocab": found.model.vocab == ours.model.vocab,
        "model.merges": merges(found) == merges(ours),
        "added_tokens": all(ids.get(token.content) == token.id for token in ours.added_tokens),
        "normalizer": found.normalizer == ours.normalizer,
        "pre_tokenizer": found.pre_tokenizer == ours.pre_tokenizer,
    }
    return [part for part, is_same in same.items() if not is_same]


def check_tokenizer(base: Path, *, refuse: bool) -> None:
    """Check that a base's tokenizer.json, if it has one, is gpt-oss's: examples are tokenised without it.

    Args:
        base: the checkpoint's directory.
        refuse: another one is an error; otherwise a warning.

    Raises:
        InputError: it is another one and `refuse`, or it cannot be read.
    """
    path = base / TOKENIZER_JSON
    if not path.is_file() or not (differing := tokenizer_differences(path)):
        return
    what = f"{path} is another tokenizer than gpt-oss's: {', '.join(differing)} differ"
    why = "training data are rendered with o200k_harmony; to this base the same ids are other words"
    if refuse:
        raise InputError(what, why=why, fix=TOKENIZER_FIX)
    log.warning(f"{what}; {why}")


def _build_tokenizer() -> Tokenizer:
    ranks = _read_ranks()
    spelling = _byte_spelling()

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    ids = _added_tokens()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in sorted(ids, key=ids.__getitem__)]
    )
    return tokenizer


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that joins into one, by the rank of the result, then of the left part, then of the right.

    tiktoken stores ranks only; a `tokenizers` BPE wants merges, and this order of them is the published file's.
    """
    merges: list[tuple[bytes, bytes]] = []
    for token in ranks:
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in halves if left in ranks and right in ranks]
        merges.extend(sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])))
    return merges


def _read_ranks() -> dict[bytes, int]:
    content = rank_file().read_bytes()
    if hashlib.sha256(content).hexdigest() != RANK_FILE_SHA256:
        raise InputError(
            f"{rank_file()} is damaged", why="its sha256 is not the published file's", fix="reinstall gpt-oss-finetune"
        )
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _added_tokens() -> dict[str, int]:
    table = json.loads((rank_file().parent / "special_tokens.json").read_text())
    added: dict[str, int] = table["hf_added_tokens"]
    return added


def _byte_spelling() -> list[str]:
    """The character that represents each byte in byte-level BPE files: itself if printable, else one from U+0100 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    code_points = {byte: byte for byte in prints} | {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(code_points[byte]) for byte in range(256)]

"""The files of a base that go with a merged export, and its chat template.

Only files that are known by name are copied: whatever else lies in the base's directory, such as a `.env`, stays there.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from finetune import log
from finetune.config.validate import load_run_config
from finetune.data.harmony.chat_template import TEMPLATE_FILE, chat_template
from finetune.errors import FinetuneError, InputError
from finetune.export.options import CARD, RECORD
from finetune.model.checkpoint import CHECKSUMS_FILE, CONFIG_FILE, INDEX_FILE, Checkpoint

TERMS = tuple(name + end for name in ("LICENSE", "USAGE_POLICY", "NOTICE") for end in ("", ".txt", ".md"))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_KNOWN = (CONFIG_FILE, "generation_config.json", *TOKENIZER_FILES, "vocab.json", "merges.txt", CARD, *TERMS)
BASE_CARD = "BASE_README.md"
"""The name of the base's own README.md in an export, whose README.md is the model card."""


def companions(checkpoint: Checkpoint) -> list[Path]:
    """The base's files to copy: configuration, tokenizer, terms and card. An export has its own chat template.

    Raises:
        InputError: one of them is a link to a file outside of the base and of the hub cache's blobs.
    """
    found = sorted(path for path in checkpoint.directory.iterdir() if path.name in _KNOWN and path.is_file())
    for path in found:
        if not _stays_inside(path):
            raise InputError(
                f"{path} is a link to {path.resolve()}, outside of the base",
                why="its contents would be copied into the export, and published with it",
                fix="put a copy of the file in its place, if it belongs to the base",
            )
    return found


def left_out(checkpoint: Checkpoint) -> list[str]:
    """Names of the base's files and directories that are neither weights nor copied, without those made anew."""
    shards = {entry.file for entry in checkpoint.stored.values()}
    known = {*_KNOWN, *shards, INDEX_FILE, CHECKSUMS_FILE, TEMPLATE_FILE, RECORD, BASE_CARD}
    return sorted(path.name for path in checkpoint.directory.iterdir() if path.name not in known)


def tell_left_out(checkpoint: Checkpoint) -> None:
    """Print which files of the base an export will not have.

    Raises:
        InputError: as `companions`.
    """
    companions(checkpoint)
    if others := left_out(checkpoint):
        log.info(f"not copied, since no model needs them: {', '.join(others)}")


def copy_companions(files: Sequence[Path], directory: Path) -> None:
    """Copy files by their names; the base's README.md makes room for the model card."""
    for path in files:
        shutil.copyfile(path, directory / (BASE_CARD if path.name == CARD else path.name))


def export_template(base: Path, run: Path | None) -> str:
    """The chat template of a merged export: ours with the run's values, without a run the base's own.

    Says so where it is not the base's.
    """
    own = base / TEMPLATE_FILE
    has_own = own.is_file() and _stays_inside(own)
    try:
        config = load_run_config(run / "config.yaml") if run is not None else None
    except FinetuneError as error:
        log.warning(f"the run's recipe cannot be read, so the chat template is not made from it: {error.what}")
        config = None
    if config is None and has_own:
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{own} cannot be read: {error}", fix="put the published file there, or none") from error
    if not has_own:
        log.warning(f"the base has no {TEMPLATE_FILE}: the export gets the toolkit's")
    if config is None:
        return chat_template()
    log.info(f"chat template: the toolkit's, as trained (convention {config.data.convention})")
    return chat_template(config.data)


def _stays_inside(path: Path) -> bool:
    """Whether a path is no link, or one to a file of its own directory or of the hub cache's blobs."""
    if not path.is_symlink():
        return True
    target, directory = path.resolve(), path.parent.resolve()
    if target.is_relative_to(directory):
        return True
    own_repository = directory.parent.name == "snapshots" and target.parent == directory.parent.parent / "blobs"
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return own_repository or (target.parent.name == "blobs" and target.parent.parent.parent == cache)

"""Open a frozen base: the one way from a recipe's `model` part to a model that is ready to compute.

Every command that needs a live base calls `open_base`, so all of them compute the same function, in the same storage
formats and with the same kernels. `tests/model/test_open.py` checks that no other module builds a base.
"""

from __future__ import annotations

import torch

from finetune import log
from finetune.config.schema import ModelConfig
from finetune.errors import ConfigError, InputError, MachineError
from finetune.model.attention import select_attention_kernel
from finetune.model.build import DTYPES, Base, build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import select_expert_kernel
from finetune.model.hub import locate_base
from finetune.model.identity import verify_checksums
from finetune.model.shards import ShardedLayers
from finetune.model.storage import BaseStorage, check_storage, describe_storage, storage_table


def open_base(
    config: ModelConfig,
    *,
    checkpoint: Checkpoint | None = None,
    shards: ShardedLayers | None = None,
    verify_files: bool = True,
    quiet: bool = False,
) -> Base:
    """Read the base that a recipe's `model` part describes, choose its kernels and check it.

    Args:
        config: where the base is, its device and dtype, its storage formats and its kernels.
        checkpoint: the base's files, opened already. None: `config.path` is located, downloaded if needed, and opened.
        shards: receives the layers, of which this rank then stores a part. None: this rank stores them whole.
        verify_files: compare SHA-256 checksums before reading, unless `model.verify_checksums` is false. A caller that
            compares the base's identity with a recorded one needs no checksums.
        quiet: log nothing of what was chosen.

    Returns:
        The base, frozen, in evaluation mode, without an adapter.

    Raises:
        ConfigError: a setting does not fit the device, or a revision was given for a directory.
        InputError: the files are missing or damaged, or the base is not `model.identity`.
        MachineError: the device, a kernel or a library that the recipe demands is missing, or a download failed.
        CheckError: a part of the base is not stored in the format asked for.
    """
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    if checkpoint is None:
        checkpoint = Checkpoint.open(locate_base(config.path, config.revision).directory)
    if verify_files:
        _verify_files(checkpoint, config)
    storage = BaseStorage.of(config)
    base = build_base(checkpoint, device, dtype, config.experts_per_chunk, storage, shards)
    _check_identity(base, config)
    choices = [
        select_expert_kernel(base.model, config.expert_kernel),
        select_attention_kernel(base.model, config.attention_kernel),
    ]
    table = storage_table(base.model)
    if not quiet:
        log.info(f"base: {config.path}, identity {base.identity[:12]}, {base.compute_dtype} on {device}")
        for choice in choices:
            log.info(choice.describe())
        log.info(describe_storage(table))
        if shards is not None:
            log.info(shards.describe())
    check_storage(table, storage)
    return base


def choose_device(config: ModelConfig) -> torch.device:
    """The device that a recipe asks for.

    Raises:
        MachineError: `cuda` was asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "model.device is cuda, but torch finds no GPU",
            why=f"this torch is {torch.__version__}; a build with +cpu cannot use one",
            fix="install a CUDA build of torch (README, Install), or set model.device=cpu",
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The compute dtype that a recipe asks for on this device (`auto`: bfloat16 on a GPU, float32 on a CPU).

    Raises:
        ConfigError: float32 on a GPU, where torch's grouped matrix product takes bfloat16 only.
    """
    if device.type == "cuda" and config.compute_dtype == "float32":
        raise ConfigError(
            "model.compute_dtype is float32 on a GPU",
            why="the experts' grouped matrix product takes bfloat16 there",
            fix="leave model.compute_dtype at auto, or set model.device=cpu",
        )
    if config.compute_dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[config.compute_dtype]


def _verify_files(checkpoint: Checkpoint, config: ModelConfig) -> None:
    if not config.verify_checksums:
        log.info("base files: checksums not compared (model.verify_checksums=false)")
        return
    with log.Progress("checking base files", None, "MiB") as progress:
        if verify_checksums(checkpoint, progress):
            log.info("base files: every SHA-256 is as it was written or downloaded")
        else:
            log.info("base files: no SHA-256 to compare with; the identity below is that of the bytes read")


def _check_identity(base: Base, config: ModelConfig) -> None:
    if config.identity is not None and not base.identity.startswith(config.identity):
        raise InputError(
            f"the base's identity is {base.identity}, model.identity says {config.identity}",
            why="it differs in at least one bit from the base that was meant",
            fix="download or copy the checkpoint again, or correct model.identity",
        )

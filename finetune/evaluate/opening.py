"""Opening an adapter over its base, for evaluation, generation and chat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetune import log
from finetune.adapters.attach import attach_file
from finetune.adapters.config_file import resolve_run, why_unfinished
from finetune.adapters.lora import Adapter
from finetune.adapters.provenance import BaseRecord, refuse_other_base, warn_other_storage
from finetune.adapters.store import AdapterFile
from finetune.config.schema import DataConfig, ModelConfig, RunConfig
from finetune.config.validate import load_run_config
from finetune.data.harmony.tokenizer import check_tokenizer
from finetune.errors import InputError
from finetune.model.build import DTYPES, Base
from finetune.model.forward import check_packing
from finetune.model.open import open_base


@dataclass(frozen=True)
class LoadedModel:
    """A base with an adapter attached, in evaluation mode.

    Attributes:
        base: frozen.
        adapter: attached; `adapter.disabled()` gives the base alone.
        directory: the adapter's.
        run: the run it belongs to, or None.
        config: that run's configuration, or None.
    """

    base: Base
    adapter: Adapter
    directory: Path
    run: Path | None
    config: RunConfig | None

    @property
    def data(self) -> DataConfig:
        """Settings for rendering prompts: those of the run, or the defaults."""
        return self.config.data if self.config else DataConfig(train={})


def open_model(
    path: Path, *, base: str | None = None, revision: str | None = None, device: str | None = None
) -> LoadedModel:
    """Load the base of a run's adapter, or of an adapter alone, and attach the adapter.

    Args:
        path: a run directory, or an adapter directory.
        base: directory or hub name of the base. None: the one the adapter was trained on.
        revision: branch, tag or commit of a hub name. None: the one it was trained on, if `base` is None too.
        device: `auto`, `cpu` or `cuda`; None: as in the run, or `auto`.

    Raises:
        InputError: there is no adapter, it is damaged, or it belongs to another base; or the base is unknown.
    """
    directory, run = resolve_run(path)
    if (why := why_unfinished(directory, run)) is not None:
        log.warning(f"{directory} is not finished: {why}")
    config = load_run_config(run / "config.yaml") if run else None
    file = AdapterFile.open(directory)
    name = base or file.base.name
    if not name:
        raise InputError(f"{directory} does not name the base it belongs to", fix="name it with --base")
    if base is None and revision is None:
        revision = file.base.revision
    settings = replace(config.model if config else ModelConfig(path=name), path=name, revision=revision)
    if device is not None:
        # A run's demand for a kernel applies where it ran; on a device named here it is a preference.
        settings = replace(settings, device=device, expert_kernel="auto")  # type: ignore[arg-type]
    settings = _as_trained_over(settings, file.base)
    # The adapter's recorded identity is compared below, so neither checksums nor the recipe's identity are needed.
    loaded = open_base(replace(settings, identity=None), verify_files=False)
    check_tokenizer(loaded.checkpoint.directory, refuse=False)  # nothing here reads it, but exports copy it
    check_packing(loaded.model)
    refuse_other_base(file.base, loaded.identity, directory)
    warn_other_storage(file.base, loaded.storage_changes, directory)
    adapter = attach_file(loaded, file, DTYPES[config.adapter.dtype] if config else torch.float32)
    log.info(f"adapter: {directory}")
    loaded.model.eval()
    return LoadedModel(loaded, adapter, directory, run, config)


def _as_trained_over(settings: ModelConfig, base: BaseRecord) -> ModelConfig:
    """Settings that store the base as in training, where that changed its values: an adapter alone records it too."""
    if "experts" in base.storage:
        settings = replace(settings, expert_storage=base.storage["experts"]["format"])  # type: ignore[arg-type]
    if "attention" in base.storage:
        settings = replace(settings, attention_storage=base.storage["attention"]["format"])  # type: ignore[arg-type]
    return settings

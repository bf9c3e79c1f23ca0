"""An adapter over its base, opened for use: what evaluation, generation and chat begin with."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from finetune import log
from finetune.adapters.config_file import resolve_run
from finetune.adapters.layout import EXPERT_PARAMETERS, ROUTER_PARAMETER
from finetune.adapters.lora import Adapter, attach_adapter
from finetune.adapters.store import CONFIG, ROUTER_BIAS, read_adapter_into, read_provenance
from finetune.config.schema import (
    AdapterConfig,
    AttentionAdapterConfig,
    AttentionTarget,
    DataConfig,
    ExpertAdapterConfig,
    ModelConfig,
    RouterAdapterConfig,
    RunConfig,
)
from finetune.config.validate import load_run_config
from finetune.errors import InputError
from finetune.model.build import Base
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
        """How prompts are rendered: as in the run, or by the defaults."""
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
        InputError: no adapter there, it is damaged, or it belongs to another base; the base is not known.
    """
    directory, run = resolve_run(path)
    config = load_run_config(run / "config.yaml") if run else None
    facts = read_provenance(directory) or {}
    stored = _stored_config(directory)
    name = base or facts.get("base_name") or stored.get("base_model_name_or_path")
    if not name:
        raise InputError(f"{directory} does not say which base it belongs to", fix="name it with --base")
    if base is None and revision is None:
        revision = facts.get("base_revision") or stored.get("revision")
    settings = replace(config.model if config else ModelConfig(path=name), path=name, revision=revision)
    if device is not None:
        # A run's demand for a kernel applies where it ran; on a device named here it is a preference.
        settings = replace(settings, device=device, expert_kernel="auto")  # type: ignore[arg-type]
    settings = _as_trained_over(settings, facts)
    adapter_config = config.adapter if config else adapter_config_of(directory, stored)
    # The adapter's recorded identity is compared below, so neither checksums nor the recipe's identity are needed.
    loaded = open_base(replace(settings, identity=None), verify_files=False)
    check_packing(loaded.model)
    # The file has factors for every expert, zeros where a run adapted only some.
    adapter_config = replace(adapter_config, experts=_as_filed(adapter_config.experts, directory, stored))
    adapter = attach_adapter(loaded, replace(adapter_config, init_from=None), seed=0)
    read_adapter_into(directory, adapter, adapter_config, loaded.identity, loaded.held_as)
    log.info(f"adapter: {directory}")
    loaded.model.eval()
    return LoadedModel(loaded, adapter, directory, run, config)


def _as_filed(experts: ExpertAdapterConfig, directory: Path, stored: dict[str, Any]) -> ExpertAdapterConfig:
    """A recipe's experts as its adapter's file has them: all of them, and with the highest rank where ranks differ."""
    rank = experts.rank
    if experts.rank_by != "uniform":
        patterns = stored.get("rank_pattern") or {}
        found = [value for name, value in patterns.items() if name.endswith(EXPERT_PARAMETERS[0])]
        rank = found[0] if found else stored.get("r", rank)
        if not isinstance(rank, int):
            raise InputError(f"{directory / CONFIG}: the rank of experts is {rank!r}, not a number")
    return replace(experts, select="all", share="none", rank_by="uniform", max_rank=None, rank=rank)


def _as_trained_over(settings: ModelConfig, facts: dict[str, Any]) -> ModelConfig:
    """Hold the base as it was held in training, where that changed its values: an adapter alone records it too."""
    held_as = facts.get("base_held_as") or {}
    if "experts" in held_as:
        settings = replace(settings, expert_storage=held_as["experts"]["format"])
    if "attention" in held_as:
        settings = replace(settings, attention_storage=held_as["attention"]["format"])
    return settings


def adapter_config_of(directory: Path, stored: dict[str, Any]) -> AdapterConfig:
    """What a recipe's `adapter` would be for an adapter that no run comes with, from its adapter_config.json.

    Reading the adapter compares every field with what this gives, so a guess that is wrong is an error there.

    Raises:
        InputError: something in it says that one recipe's `adapter` cannot describe it.
    """
    patterns = {"rank": stored.get("rank_pattern") or {}, "alpha": stored.get("alpha_pattern") or {}}
    rank, alpha = stored.get("r"), stored.get("lora_alpha")
    targets = set(stored.get("target_modules") or [])
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not targets <= set(get_args(AttentionTarget)):
        raise InputError(
            f"{directory / CONFIG} describes an adapter that is none of this toolkit's",
            fix="bring it over first: finetune adapter import",
        )
    parameters = [str(name) for name in stored.get("target_parameters") or []]
    has_experts = any(name.endswith(EXPERT_PARAMETERS) for name in parameters)
    has_router = any(name.endswith(ROUTER_PARAMETER) for name in parameters)
    mode: Literal["lora", "full"] = "full" if (directory / ROUTER_BIAS).is_file() else "lora"
    router = {kind: found.get(ROUTER_PARAMETER) for kind, found in patterns.items()}
    experts = {kind: found.get(EXPERT_PARAMETERS[0]) for kind, found in patterns.items()}
    return AdapterConfig(
        attention=AttentionAdapterConfig(
            rank=rank if targets else 0,
            alpha=float(alpha),
            targets=tuple(t for t in get_args(AttentionTarget) if t in targets) or get_args(AttentionTarget),
        ),
        experts=ExpertAdapterConfig(
            rank=(experts["rank"] or rank) if has_experts else 0, alpha=float(experts["alpha"] or alpha)
        ),
        router=RouterAdapterConfig(
            mode=mode if has_router else "frozen", rank=router["rank"] or rank, alpha=float(router["alpha"] or alpha)
        ),
        rslora=bool(stored.get("use_rslora")),
    )


def _stored_config(directory: Path) -> dict[str, Any]:
    try:
        content = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / CONFIG} cannot be read", why=str(error)) from error
    if not isinstance(content, dict):
        raise InputError(f"{directory / CONFIG} holds no JSON object")
    return content

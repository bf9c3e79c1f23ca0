"""Reads adapter_config.json and checks its types, and finds the adapter that a path on the command line means.

Free of torch, so that a misspelt path is reported at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.derive import lora_scale
from finetune.config.suggest import suggest_run
from finetune.errors import InputError
from finetune.files import read_json

CONFIG = "adapter_config.json"
UNVERIFIED = "adapter_unverified"
"""Directory of a run's adapter that has not passed its read-back."""
_MAX_PATTERN = 500  # characters
_MAX_REPEATS = 3  # of `*`, `+` and `{` in a pattern: more of them, or nested ones, can make a search endless
GROUPED_BY_EXPERT, RANK_MAJOR = "grouped_by_expert", "rank_major"  # Unsloth's words for the order of experts' lora_B
_ANY = object()
_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
# Settings that may stand in the file, and the values under which its tensors are a plain LoRA. Whatever is not listed
# here, such as a setting of a later PEFT, may have only a value that asks for nothing: it may change what tensors mean.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "inference_mode", "r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern",
            "use_rslora", "layers_pattern", "layers_to_transform", "exclude_modules", "megatron_core", "runtime_config",
            "ensure_weight_tying",
            # Used while training alone.
            "lora_dropout", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "loraplus_lr_ratio",
            # Read only together with another setting, which is looked at.
            "qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
        ),
        (_ANY,),
    ),
    "bias": ("none",),
    # These set where training starts and leave the base as it is (PEFT 0.21.2, tuners/lora/layer.py; vLLM 0.33 lists
    # them too). PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take their start out of the base's weights.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
    "lora_B_layout": (GROUPED_BY_EXPERT, RANK_MAJOR),
    "unsloth_fused_expert_lora": (_ANY,),  # says the same for each projection; `_check_orders` compares
}  # fmt: skip
_WITHOUT_EFFECT = (
    "lora_dropout", "init_lora_weights", "eva_config", "layers_to_transform", "exclude_modules", "lora_dtype",
    "lorap_lr_ratio", "lorap_emb_lr", "loraplus_lr_ratio",
)  # fmt: skip
_ADVICE = {
    "init_lora_weights": "save it with PEFT's path_initial_model_for_weight_conversion, which writes a plain LoRA",
    "alora_invocation_tokens": "aLoRA acts after its invocation tokens only: serve it with PEFT, or train a plain LoRA",
    "use_dora": "merge it with the PEFT that wrote it, and use the merged model",
    "trainable_token_indices": "train it without new tokens",
    "modules_to_save": "train it without fully trained modules",
    "lora_B_layout": f"{GROUPED_BY_EXPERT!r} and PEFT's own, {RANK_MAJOR!r}, are known here",
    "fine_tune_type": "use the adapter that it was made from",
}
_FIX = "use the adapter_config.json that was written with the tensors"
_WEIGHTS = "adapter_model.safetensors"
# Files of directories that are adapters of another kind, or none: what they are, and what to do.
_SOURCE = "use the adapter that it was made from"
_OTHER_FORMS: tuple[tuple[str, str, str], ...] = (
    ("adapters.safetensors", "an adapter of mlx-lm", _SOURCE),
    ("*.gguf", "an adapter of llama.cpp (a GGUF LoRA)", _SOURCE),
    ("adapter_model-*-of-*.safetensors", "split into several files", "save it in one adapter_model.safetensors"),
    ("adapter_model.bin", "saved as a pickle, which can run code when it is read",
     "save it as safetensors with the PEFT that wrote it"),
    ("adapter_model.p*t*", "saved as a pickle, which can run code when it is read",
     "save it as safetensors with the PEFT that wrote it"),
    ("*.distcp", "a distributed checkpoint of torch", "save it with PEFT's save_pretrained"),
    ("model*.safetensors", "a whole model, no adapter", "give it as a base (model.path), or give an adapter"),
    (f"*/{_WEIGHTS}", "a folder of adapters", "give one of its folders"),
)  # fmt: skip


@dataclass(frozen=True)
class PeftConfig:
    """An adapter_config.json whose settings have PEFT's types.

    Attributes:
        settings: all of the file.
    """

    settings: Mapping[str, Any]

    @property
    def use_rslora(self) -> bool:
        """Whether scales are alpha / sqrt(rank)."""
        return bool(self.settings.get("use_rslora"))

    @property
    def peft_version(self) -> str | None:
        """The release of PEFT that wrote it, if it says so."""
        return self.settings.get("peft_version")

    @property
    def base_name(self) -> str | None:
        """Directory or hub name of the base."""
        return self.settings.get("base_model_name_or_path")

    @property
    def base_revision(self) -> str | None:
        """Of a hub name."""
        return self.settings.get("revision")

    def targets_parameter(self, path: str) -> bool:
        """Whether a parameter is targeted, by its full name or by the end of it (as PEFT matches)."""
        return any(f".{path}".endswith(f".{target}") for target in self.settings.get("target_parameters") or ())

    def targets_module(self, path: str) -> bool:
        """Whether `target_modules` adapts a module: by the end of its name, or by one regular expression (as PEFT)."""
        targets = self.settings.get("target_modules")
        if isinstance(targets, str):  # Unsloth's are long and could take for ever; they mean all of a kind
            return targets == "all-linear" or not _is_quick(targets) or re.fullmatch(targets, path) is not None
        return any(f".{path}".endswith(f".{target}") for target in targets or ())

    def surely_targets(self, path: str, layer: int) -> bool:
        """Whether PEFT would adapt a weight of the base; False too where a regular expression would have to tell."""
        if self.targets_parameter(path) or self.targets_parameter(f"{path}.weight"):
            return True
        targets = self.settings.get("target_modules")
        if ".self_attn." not in path or self.leaves_out(path, layer):
            return False
        return targets == "all-linear" or (isinstance(targets, list) and self.targets_module(path))

    def leaves_out(self, path: str, layer: int) -> str | None:
        """The setting by which PEFT would ignore the tensors of a module (not of a parameter); None if none does."""
        layers, excluded = self.settings.get("layers_to_transform"), self.settings.get("exclude_modules")
        targets = self.settings.get("target_modules")
        if isinstance(targets, list) and targets and not self.targets_module(path):
            return "target_modules"
        if layers is not None and layers != [] and layer not in ([layers] if isinstance(layers, int) else layers):
            return "layers_to_transform"
        if isinstance(excluded, str):
            return "exclude_modules" if re.fullmatch(excluded, path) else None
        matches = (f".{path}".endswith(f".{name}") for name in excluded or ())
        return "exclude_modules" if any(matches) else None

    def ignored(self) -> dict[str, Any]:
        """Settings with a value of their own that count while training alone, or name what the tensors show anyway."""
        return {key: self.settings[key] for key in _WITHOUT_EFFECT if self.settings.get(key) not in (*_NOTHING, True)}

    @property
    def expert_order(self) -> str | None:
        """Unsloth's word for the order of experts' lora_B: expert after expert, or PEFT's; None: not said."""
        return next(iter(_orders(self.settings, "lora_B_layout")), None)

    @property
    def is_grouped_by_expert(self) -> bool:
        """Whether lora_B of experts is stored expert after expert [out, E·r] (Unsloth's marker), not rank-major."""
        return self.expert_order == GROUPED_BY_EXPERT

    def rank(self, path: str) -> int:
        """Rank of one weight."""
        return int(self._patterned("rank_pattern", "r", path))

    def scale(self, path: str, rank: int) -> float:
        """Scale of one weight: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        alpha = float(self._patterned("alpha_pattern", "lora_alpha", path))
        return lora_scale(alpha, rank, rslora=self.use_rslora)

    def _patterned(self, patterns: str, default: str, path: str) -> float:
        """The first pattern whose regular expression ends the path (as in PEFT), or the default."""
        for pattern, value in (self.settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return float(value)
        found = self.settings.get(default)
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise InputError(f"adapter_config.json: {default} is {found!r}, not a number")
        return found


def read_adapter_config(directory: Path) -> PeftConfig:
    """Read a directory's adapter_config.json.

    Raises:
        InputError: it is missing, not a JSON object, a setting that is used here has another type than PEFT's, or it
            asks for something that nothing here supports (DoRA, biases, fully trained modules).
    """
    path = directory / CONFIG
    refuse_other_form(directory)
    settings = read_json(path)
    for key, (is_right, words) in _SETTINGS.items():
        if settings.get(key) is not None and not is_right(settings[key]):
            raise InputError(f"{path}: {key} is {str(settings[key])[:80]!r}, not {words}", fix=_FIX)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(key) or {}:
            _check_pattern(path, key, pattern)
    if isinstance(settings.get("exclude_modules"), str):
        _check_pattern(path, "exclude_modules", settings["exclude_modules"])
    kind = settings.get("peft_type")
    if kind != "LORA" and (kind is not None or "lora_alpha" not in settings):  # tinker writes r and lora_alpha alone
        raise InputError(f"{directory}: peft_type is {kind!r}, only LORA can be exported")
    for key, value in settings.items():
        allowed = _HARMLESS.get(key, ())
        plain = value.lower() if isinstance(value, str) else value
        if value not in _NOTHING and _ANY not in allowed and plain not in allowed:
            raise InputError(
                f"{path}: {key} is {repr(value)[:80]}: with it the tensors are not a plain LoRA of the base, as far as "
                "is known here",
                why="reading them as one would change what the adapter does, without a sign",
                fix=_ADVICE.get(key, "merge it with the PEFT that wrote it, or train it without this setting"),
            )
    _check_orders(path, settings)
    return PeftConfig(settings)


def refuse_other_form(directory: Path) -> None:
    """Raise InputError for a directory without PEFT's weights file whose files tell what it is instead."""
    if (directory / _WEIGHTS).is_file():
        return
    for pattern, what, fix in _OTHER_FORMS:
        if found := sorted(directory.glob(pattern)):
            name = found[0].relative_to(directory)
            raise InputError(f"{directory} is {what} ({name}), not an adapter in PEFT's layout", fix=fix)


def _orders(settings: object, key: str, depth: int = 4) -> list[str]:
    """What settings, and those inside them, say under a key."""
    if not isinstance(settings, Mapping) or not depth:
        return []
    found = [value if isinstance(value, str) else repr(value) for value in [settings.get(key)] if value is not None]
    return found + [order for value in settings.values() for order in _orders(value, key, depth - 1)]


def _check_orders(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what Unsloth's settings say about the order of factors, unless it is one order that is known here."""
    orders = dict.fromkeys(_orders(settings, "lora_B_layout"))
    if len(orders) > 1 or orders.keys() - {GROUPED_BY_EXPERT, RANK_MAJOR}:
        raise InputError(
            f"{path}: lora_B_layout is {' and '.join(orders)} for different projections",
            fix=_ADVICE["lora_B_layout"] + "; all projections must have the same",
        )
    if odd := set(_orders(settings, "lora_A_layout")) - {GROUPED_BY_EXPERT}:  # PEFT's lora_A is expert after expert
        raise InputError(f"{path}: lora_A_layout is {min(odd)!r}, not {GROUPED_BY_EXPERT!r} as in PEFT", fix=_FIX)


def has_control_characters(text: str) -> bool:
    """Whether text could break a line or change a terminal where it is printed."""
    return re.search(r"[\x00-\x1f\x7f-\x9f]", text) is not None


def _is_quick(pattern: str) -> bool:
    """Whether a search with this regular expression surely ends soon."""
    repeats = sum(map(pattern.count, "*+{"))
    return len(pattern) <= _MAX_PATTERN and repeats <= _MAX_REPEATS and not re.search(r"\)[*+{]", pattern)


def _check_pattern(path: Path, key: str, pattern: str) -> None:
    if not _is_quick(pattern):
        raise InputError(f"{path}: {key} has the pattern {pattern[:80]!r}, whose search may never end", fix=_FIX)
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: {key} has the pattern {pattern[:80]!r}: {error}", fix=_FIX) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """Text for one line: a name with control characters could change what a terminal or a card shows."""
    return isinstance(value, str) and value.isprintable()


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_layers(value: Any) -> bool:
    return _is_rank(value) or (isinstance(value, list) and all(map(_is_rank, value)))


def _maps_to(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number"),
    "lora_alpha": (_is_number, "a number"),
    "use_rslora": (_is_flag, "true or false"),
    "rank_pattern": (_maps_to(_is_rank), "names with whole numbers"),
    "alpha_pattern": (_maps_to(_is_number), "names with numbers"),
    "target_parameters": (_is_names, "a list of names"),
    "target_modules": (_is_names, "a list of names"),
    "base_model_name_or_path": (_is_text, "a name without control characters"),
    "revision": (_is_text, "a name without control characters"),
    "lora_B_layout": (_is_text, "text"),
    "layers_to_transform": (_is_layers, "a number or a list of numbers"),
    "exclude_modules": (_is_names, "a list of names"),
}


def why_unfinished(directory: Path, run: Path | None) -> str | None:
    """Why an adapter is no result of its run, as a clause; None if it is, or belongs to no run.

    Args:
        directory, run: as `resolve_run` returns them.
    """
    if run is None:
        return None
    if directory.name == UNVERIFIED:
        return "it has not passed its read-back by stock PEFT"
    manifest = run / "manifest.json"
    status = read_json(manifest, "a run's manifest").get("status") if manifest.is_file() else None
    return None if status in (None, "finished") else f"its run is {status}"


def resolve_run(path: Path) -> tuple[Path, Path | None]:
    """Find the adapter that a path means.

    Args:
        path: a run directory, or an adapter directory (in a run or alone).

    Returns:
        The adapter's directory, and the run's if it belongs to one.

    Raises:
        InputError: neither.
    """
    if (path / CONFIG).is_file():
        in_run = path.name in ("adapter", UNVERIFIED) and (path.parent / "config.yaml").is_file()
        return path, path.parent if in_run else None
    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter", path
    if (path / "config.yaml").is_file():
        unverified = path / UNVERIFIED
        raise InputError(
            f"run {path} has no adapter yet",
            why=f"{unverified} has not passed its read-back" if unverified.is_dir() else None,
            fix=f"finish it: finetune train --resume {path}",
        )
    refuse_other_form(path)
    found = "is neither a run nor an adapter directory" if path.is_dir() else "does not exist"
    raise InputError(
        f"{path} {found}", fix=suggest_run(path) or "give a run directory, or one with adapter_config.json"
    )

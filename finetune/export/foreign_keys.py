"""Tensor names of other trainers, turned into the two layouts that are read here: PEFT's, and expert by expert.

A live state dict has the adapter's name in its keys (`lora_A.default.weight`), wrappers add words to paths
(`_orig_mod`, `module`), Unsloth numbers the experts last (`gate_up_projs.3`), and others stack them ([E, r, in]) under
gate, up and down or w1, w3 and w2. What cannot be turned is refused by what it is.

Shape legend: E experts, r rank.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.adapters.config_file import CONFIG, PeftConfig
from finetune.adapters.store import WEIGHTS
from finetune.errors import InputError
from finetune.model.headers import read_header

_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module|inner)\."
)
_TINKER_ATTENTION = re.compile(r"(?<=\.layers\.)(\d+)\.attn\.(?=[qkvo]_proj\.)")
_ADAPTER_NAME = re.compile(r"\.lora_([AB])\.(?!weight$)[^.]+\.weight$")
_NUMBERED_LAST = re.compile(r"\.experts\.(gate_up|gate|up|down)_projs\.(\d+)\.")
_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj|w[123])\.lora_([AB])\.weight")
_MIXTRAL_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_KNOWN = re.compile(
    r"(base_model\.model\.)?model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.router|mlp\.experts(\.base_layer)?"
    r"|mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj|gate_up_proj))\.lora_[AB]\.weight"
)
_OTHERS: tuple[tuple[str, str, str], ...] = (
    ("trainable_tokens", "embeddings of single tokens (trainable_token_indices)", "train it without new tokens"),
    (r"lora_magnitude_vector", "DoRA (use_dora)", "merge it with the PEFT that wrote it, and use the merged model"),
    (r"embed_tokens|lm_head|lora_embedding", "the embedding or the output head", "train it without them"),
    (r"modules_to_save|router\.weight$", "fully trained modules (modules_to_save)", "train it without them"),
    (r"\.bias$|_proj_bias$", "biases (bias, lora_bias)", "train it with bias: none"),
    (r"^blk\.\d+\.", "llama.cpp's names (a GGUF LoRA)", "import the adapter that it was made from"),
    (r"\.lora_[ab]$", "mlx-lm's names", "import the adapter that it was made from"),
    (r"^(module\.)?decoder\.layers\.|linear_(qkv|proj|fc[12])", "Megatron-Core's names", "export it to PEFT's layout"),
    (r"norm\.", "norms", "train it without them"),
    (
        r"_proj(\.weight|_blocks|_scales)?$",
        "whole weights, no LoRA factors",
        "give a whole model as a base (model.path)",
    ),
)


@dataclass(frozen=True)
class Translated:
    """An adapter directory whose keys are known here.

    Attributes:
        directory: of the files; the given one, or a copy with other names in the scratch directory.
        changes: what was done to the names, in words; empty: nothing.
    """

    directory: Path
    changes: tuple[str, ...]


def translate(directory: Path, config: PeftConfig, scratch: Path, num_experts: int | None) -> Translated:
    """Give an adapter's tensors names that are known here.

    Args:
        directory: with `adapter_model.safetensors`.
        config: its adapter_config.json.
        scratch: an existing directory for a copy, where one is needed.
        num_experts: of the base, if known: factors that all experts share are repeated.

    Raises:
        InputError: a key of a layout that cannot be imported (named), two keys with one meaning, or an expert that the
            config names and the file lacks.
    """
    path = directory / WEIGHTS
    shapes = {name: entry.shape for name, entry in read_header(path).items()}
    changes: dict[str, None] = {}
    names: dict[str, str] = {}
    for key in shapes:
        new = _renamed(key, changes)
        if new in names.values():
            raise InputError(f"{path}: {key} and another key both mean {new}", fix="save one adapter alone")
        names[key] = new
    stacks = {key: new for key, new in names.items() if _STACKED.fullmatch(new) and len(shapes[key]) == 3}
    for key, new in names.items():
        if key not in stacks and _KNOWN.fullmatch(new) is None:
            raise _unknown(path, key)
    if stacks:
        changes["experts stacked in one tensor, taken apart"] = None
    if changes:
        copy = scratch / directory.name
        copy.mkdir()
        save_file(dict(_tensors(path, names, stacks, shapes, num_experts)), copy / WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(directory / CONFIG, copy / CONFIG)
        directory = copy
    _refuse_missing_experts(directory / WEIGHTS, path, config, num_experts)
    return Translated(directory, tuple(changes))


def _renamed(key: str, changes: dict[str, None]) -> str:
    """A key in the names that are read here; `changes` gets what was done."""
    steps: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("words of wrappers removed from names", lambda k: _WRAPPERS.sub("", k)),
        ("the adapter's name removed from names", lambda k: _ADAPTER_NAME.sub(r".lora_\1.weight", k)),
        ("attn in names turned into self_attn", lambda k: _TINKER_ATTENTION.sub(r"\1.self_attn.", k)),
        ("experts' numbers moved in names", lambda k: _NUMBERED_LAST.sub(r".experts.\2.\1_proj.", k)),
    )
    for words, step in steps:
        new = step(key)
        if new != key:
            changes[words] = None
        key = new
    return key


def _unknown(path: Path, key: str) -> InputError:
    for pattern, what, fix in _OTHERS:
        if re.search(pattern, key):
            return InputError(f"{path} has {key}: {what}, which cannot be imported", fix=fix)
    return InputError(
        f"{path} has {key}, which is no LoRA factor of gpt-oss that can be imported",
        why="attention projections, the router and experts' projections are read, in PEFT's names, expert by expert, "
        "or stacked",
    )


def _tensors(
    path: Path,
    names: Mapping[str, str],
    stacks: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    num_experts: int | None,
) -> Iterator[tuple[str, Tensor]]:
    experts = num_experts or max((shapes[key][0] for key in stacks), default=0)
    with safe_open(path, framework="pt") as file:
        for key, new in names.items():
            tensor: Tensor = file.get_tensor(key)
            if key not in stacks:
                yield new, tensor
                continue
            match = _STACKED.fullmatch(new)
            assert match is not None
            module, name, factor = match.groups()
            if len(tensor) not in (1, experts):
                raise InputError(f"{path}: {key} has factors of {len(tensor)} experts, not of {experts}")
            name = _MIXTRAL_NAMES.get(name, name)
            for expert in range(experts):
                one = tensor[expert if len(tensor) > 1 else 0].clone()
                yield f"{module}.{expert}.{name}.lora_{factor}.weight", one


def _refuse_missing_experts(path: Path, given: Path, config: PeftConfig, num_experts: int | None) -> None:
    """Raise InputError where a file with numbered experts lacks one that its config adapts; `given` is named."""
    numbered = re.compile(r"(.*model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.lora_A\.weight")
    found: dict[tuple[str, str], set[int]] = {}
    for key in read_header(path):
        if match := numbered.fullmatch(key):
            found.setdefault((match[1], match[3]), set()).add(int(match[2]))
    experts = num_experts or max((max(numbers) + 1 for numbers in found.values()), default=0)

    def is_named(module: str, name: str, expert: int) -> bool:
        forms = (f"{module}.{expert}.{name}", f"{module}.{name}s.{expert}", f"{module}.{name}")
        return any(config.targets_module(form) for form in forms)

    says_which = any(is_named(module, name, expert) for (module, name), here in found.items() for expert in here)
    names = {name for _, name in found}
    for module in sorted({module for module, _ in found}):
        halves = {"gate_up_proj"} if (module, "gate_up_proj") in found else {"gate_proj", "up_proj"}
        for name in sorted(halves | {"down_proj"} if says_which else names):
            for expert in sorted(set(range(experts)) - found.get((module, name), set())):
                if says_which and not is_named(module, name, expert):
                    continue
                raise InputError(
                    f"{given} lacks the factors of {module}.{expert}.{name}"
                    + (f", which {CONFIG} adapts" if says_which else ""),
                    why="the file is cut short, or was written for fewer experts than the base has",
                    fix="save the adapter again; to adapt some experts only, name them in target_modules",
                )

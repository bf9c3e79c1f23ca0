"""Runs in a fresh process: compares an exported adapter, read by its target's published layout, with its source.

Deliberately imports nothing of this package, so that the writer and the checker of a layout share no line. Called as
`python adapter.py REQUEST.json`; prints `RESULT ` and JSON. Memory: one projection of one layer.

For each projection (of each expert) y = scale * B (A x) is formed on both sides, in float64, from the same random x.
Projections added because a server needs them (the other expert projection, q beside v) must give exactly zero.
Layouts: PEFT 0.21.2, SGLang 0.5.23, llama.cpp of autumn 2026, mlx-lm 0.32.2, as checked on 2026-11-22.
"""

import hashlib
import json
import os
import re
import sys
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

MAX_DIFFERENCE = 1e-5  # of an expert's largest |y|; folding a scale into B rounds once, at 6e-8
NUM_VECTORS = 4
QKV = {"q_proj", "k_proj", "v_proj"}
EXPERTS = {"gate_proj", "up_proj", "down_proj"}
PEFT = "base_model.model."
KEY = re.compile(
    r"(?:base_model\.model\.)?(model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)(\.base_layer)?)\.lora_A\.weight"
)
LLAMA = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "router": "ffn_gate_inp",
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}
# Settings of PEFT that are looked at elsewhere, or that nothing reads when an adapter is served.
READ_OR_UNUSED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "target_parameters",
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode",
    "layers_pattern", "megatron_core", "runtime_config", "ensure_weight_tying", "qalora_group_size",
}  # fmt: skip
# The values that were meant of others; what is listed nowhere, such as a setting of a later release, has none.
MEANT: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True,), "fine_tune_type": ("lora",),
}  # fmt: skip
REQUIRED = {"peft": ("peft_type",), "sglang": ("peft_type",), "mlx": ("fine_tune_type",), "gguf-lora": ()}
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
MLX_SETTINGS = {"num_layers", "lora_parameters"}
Json = dict[str, Any]
Part = tuple[int, str]  # layer and projection
Action = tuple[torch.Tensor, torch.Tensor, float]  # a [n, r, in], b [n, out, r] (n experts, or 1), scale


class WrongTensor(Exception):
    """A tensor's name, and the problem with it."""


class File:
    """Tensors of a safetensors or a GGUF file, and a GGUF's fields."""

    def __init__(self, path: str) -> None:
        self.facts: Json = {}
        if path.endswith(".gguf"):
            import gguf

            reader = gguf.GGUFReader(path)
            self.facts = {name: field.contents() for name, field in reader.fields.items()}
            stored = {tensor.name: tensor.data for tensor in reader.tensors}
            self.names, self.get = set(stored), lambda name: torch.from_numpy(np.array(stored[name]))
        else:
            file = safe_open(path, "pt")
            self.names, self.get = set(file.keys()), file.get_tensor

    def read(self, name: str) -> torch.Tensor:
        """One tensor, float64."""
        if name not in self.names:
            raise WrongTensor(name, "missing")
        tensor = self.get(name)
        if not tensor.isfinite().all():
            raise WrongTensor(name, "has values that are not finite")
        return tensor.double()


class PeftAdapter:
    """A directory in PEFT's layout: the source, or an export for PEFT and vLLM.

    Args:
        directory: with the tensors and adapter_config.json.
        served: also read by vLLM, which resolves ranks and alphas by another name of the router's weight.
    """

    def __init__(self, directory: str, *, served: bool = False) -> None:
        self.served = served
        self.file = File(os.path.join(directory, "adapter_model.safetensors"))
        self.config = read_json(directory, "adapter_config.json")
        self.stems: dict[Part, tuple[str, str]] = {}  # key without its end, and the weight's path in the model
        for key in sorted(self.file.names):
            if match := KEY.fullmatch(key):
                stem, layer, name = key.removesuffix(".lora_A.weight"), int(match[2]), match[4]
                if name != "experts":
                    self.stems[layer, name] = stem, match[1]
                    continue
                path = match[1].removesuffix(".base_layer")
                # With one expert parameter alone PEFT says `experts.lora_*` whichever it is.
                lone = not match[5] and not self.targets(f"{path}.down_proj") and self.targets(f"{path}.gate_up_proj")
                whole = "gate_up_proj" if match[5] or lone else "down_proj"
                for part in ("gate_proj", "up_proj") if whole == "gate_up_proj" else ("down_proj",):
                    self.stems[layer, part] = stem, f"{path}.{whole}"

    def targets(self, path: str) -> bool:
        """Whether the config adapts a weight."""
        listed = [*(self.config.get("target_modules") or ()), *(self.config.get("target_parameters") or ())]
        return any(f".{name}".endswith(f".{target}") for name in (path, f"{path}.weight") for target in listed)

    def setting(self, patterns: str, default: str, path: str) -> float:
        """A rank or an alpha: the first pattern that ends the weight's name, else the default.

        Raises:
            ValueError: PEFT and vLLM, which both read an export, find different ones.
        """
        found = self._matched(patterns, default, path + ".weight" * path.endswith(".router"))
        by_vllm = self._matched(patterns, default, path) if self.served else found
        if by_vllm != found:
            raise ValueError(f"{patterns} gives {found:g} to PEFT and {by_vllm:g} to vLLM, which matches {path}")
        return found

    def _matched(self, patterns: str, default: str, name: str) -> float:
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return float(value)
        return float(self.config[default])

    def action(self, part: Part) -> Action:
        """A is expert-major, B rank-major with the expert fastest; gate and up interleave along the outputs."""
        stem, path = self.stems[part]
        a, b = self.file.read(f"{stem}.lora_A.weight"), self.file.read(f"{stem}.lora_B.weight")
        rank = int(self.setting("rank_pattern", "r", path))
        scale = self.setting("alpha_pattern", "lora_alpha", path) / (
            rank**0.5 if self.config.get("use_rslora") else rank
        )
        if part[1] not in EXPERTS:
            return a.reshape(1, rank, -1), b.reshape(1, -1, rank), scale
        a, b = a.reshape(-1, rank, a.shape[1]), b.reshape(len(b), rank, -1).permute(2, 0, 1)
        if part[1] != "down_proj":
            b = b[:, ("gate_proj", "up_proj").index(part[1]) :: 2]
        return a, b, scale


class Exported:
    """The exported adapter, by the names and in the shapes that its target reads."""

    def __init__(self, target: str, directory: str) -> None:
        self.target = target
        name = {"gguf-lora": "adapter.gguf", "mlx": "adapters.safetensors"}.get(target, "adapter_model.safetensors")
        self.file = File(os.path.join(directory, name))
        self.config = self.file.facts if target == "gguf-lora" else read_json(directory, "adapter_config.json")
        self.peft = PeftAdapter(directory, served=True) if target == "peft" else None
        self.provenance = read_json(directory, "finetune.json")

    def stems(self, part: Part, num_experts: int) -> list[str]:
        """Names of a projection's tensors without their ends; for SGLang one for each expert."""
        layer, name = part
        if self.target == "gguf-lora":
            return [f"blk.{layer}.{LLAMA[name]}.weight"]
        path = f"model.layers.{layer}."
        if name not in EXPERTS:
            path += f"mlp.{name}" if name == "router" else f"self_attn.{name}"
            return [path if self.target == "mlx" else PEFT + path]
        if self.target == "mlx":
            return [f"{path}mlp.experts.{name}"]
        if self.target == "sglang":
            return [f"{PEFT}{path}mlp.experts.{expert}.{name}" for expert in range(num_experts)]
        return [f"{PEFT}{path}mlp.experts" + ("" if name == "down_proj" else ".base_layer")]

    def ends(self) -> tuple[str, str]:
        """Of the names of A and B."""
        return (".lora_a", ".lora_b") if self.target in ("gguf-lora", "mlx") else (".lora_A.weight", ".lora_B.weight")

    def action(self, part: Part, num_experts: int) -> Action:
        """As the server forms it."""
        stems = self.stems(part, num_experts)
        if self.peft:
            if part not in self.peft.stems:
                raise WrongTensor(stems[0] + self.ends()[0], "missing")
            return self.peft.action(part)
        a, b = ([self.file.read(stem + end) for stem in stems] for end in self.ends())
        if self.target == "sglang":
            if any(len(each) != self.config["r"] for each in a):
                raise ValueError(f"rank {len(a[0])} where adapter_config.json says {self.config['r']}")
            return torch.stack(a), torch.stack(b), self.config["lora_alpha"] / self.config["r"]
        first, second = a[0], b[0]
        if self.target == "gguf-lora":
            first, second = (each if each.dim() == 3 else each[None] for each in (first, second))
            return first, second, self.config["adapter.lora.alpha"] / second.shape[-1]
        settings = self.config["lora_parameters"]
        first, second = (each if each.dim() == 3 else each.T[None] for each in (first, second))
        if first.shape[1] != settings["rank"]:
            raise ValueError(f"rank {first.shape[1]} where adapter_config.json says {settings['rank']}")
        return first, second, settings["scale"]

    def settings_problem(self, parts: set[Part]) -> str | None:
        """A problem with the settings that its server reads and no tensor shows."""
        names, config = {name for _, name in parts}, self.config
        if self.target != "gguf-lora" and (problem := self._odd_setting()):
            return problem
        if self.target == "gguf-lora":
            fields = {"general.type": "adapter", "general.architecture": "gpt-oss", "adapter.type": "lora"}
            wrong = [name for name, value in fields.items() if config.get(name) != value]
            return f"{wrong[0]} is {config.get(wrong[0])!r}" if wrong else None
        if self.target == "mlx":
            stems = {stem.split(".", 3)[3] for part in parts for stem in self.stems(part, 0)}
            listed = set(config["lora_parameters"]["keys"])
            short = 0 < config["num_layers"] <= max(layer for layer, _ in parts)
            if listed - stems:
                return f"keys name {min(listed - stems)}, which has no factors"
            return "num_layers leaves layers out" if short else _left_out(stems - listed, "keys")
        if self.target == "sglang":
            patterns = any(config.get(key) for key in ("use_rslora", "rank_pattern", "alpha_pattern"))
            unread = "rsLoRA or patterns, which SGLang does not read" if patterns else None
            return unread or _left_out(names - set(config["target_modules"]), "target_modules")
        assert self.peft
        paths = {path for _, path in self.peft.stems.values()}
        return _left_out({path for path in paths if not self.peft.targets(path)}, "targets")

    def _odd_setting(self) -> str | None:
        """A setting that was not meant: it would make another update of the same tensors, or names another base."""
        known = READ_OR_UNUSED if self.target != "mlx" else MLX_SETTINGS
        settings = self.config | {key: self.config.get(key) for key in REQUIRED[self.target]}
        for key, value in settings.items():
            if key not in known and value not in MEANT.get(key, NOTHING):
                return f"{key} is {value!r}, which was not meant"
        for key, ours in (("base_model_name_or_path", "base_name"), ("revision", "base_revision")):
            if self.target != "mlx" and settings.get(key) != self.provenance.get(ours):
                return f"{key} is {settings.get(key)!r}, and the base {self.provenance.get(ours)!r}"
        inside = self.config["lora_parameters"] if self.target == "mlx" else {}
        odd = [key for key in inside if key not in ("rank", "scale", "keys") and inside[key] not in NOTHING]
        return f"{odd[0]} is {inside[odd[0]]!r}, which was not meant" if odd else None


def _left_out(names: set[str], where: str) -> str | None:
    return f"{where} lack {min(names)}" if names else None


def read_json(directory: str, name: str) -> Json:
    """A JSON file of a directory."""
    with open(os.path.join(directory, name)) as file:
        content: Json = json.load(file)
    return content


def added(target: str, names: set[str]) -> set[str]:
    """Projections that a target wants beside those a layer adapts."""
    experts = EXPERTS if names & EXPERTS and target != "gguf-lora" else set()
    return (experts | (QKV if target == "sglang" and names & QKV else set())) - names


def difference(wanted: Action | None, found: Action, seed: int) -> tuple[float, int]:
    """Largest |y - y'| of an expert relative to its largest |y|, and the expert; None stands for exactly zero."""
    a, b, scale = found
    if wanted and (a[:, 0].shape, b[..., 0].shape) != (wanted[0][:, 0].shape, wanted[1][..., 0].shape):
        raise ValueError(
            f"A {list(a.shape)} and B {list(b.shape)}, the source has {[list(w.shape) for w in wanted[:2]]}"
        )
    vectors = torch.randn(len(a), a.shape[2], NUM_VECTORS, generator=torch.Generator().manual_seed(seed)).double()
    result = scale * (b @ (a @ vectors))
    target = wanted[2] * (wanted[1] @ (wanted[0] @ vectors)) if wanted else torch.zeros_like(result)
    error, size = (result - target).abs().amax((1, 2)), target.abs().amax((1, 2))
    relative = torch.where(error > 0, error / size, error)  # infinite where nothing but zero is right
    return float(relative.max()), int(relative.argmax())


def compare(request: Json) -> Json:
    """Compare all parts of an exported directory with its source.

    Args:
        request: `target`, `directory` (what was written) and `source` (an adapter directory in PEFT's layout).

    Returns:
        `problems` by tensor or file, `sites` compared (layers x projections x experts), `kinds` (sites by projection),
        `zeros` (layers x projections that were added) and `max_relative_difference`.
    """
    directory, target = request["directory"], request["target"]
    problems: dict[str, str] = {}
    for name, digest in read_json(directory, "finetune.json")["files"].items():
        with open(os.path.join(directory, name), "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                problems[name] = "its sha256 is not the one in finetune.json"
    source, exported = PeftAdapter(request["source"]), Exported(target, directory)
    names: dict[int, set[str]] = {}
    for layer, name in source.stems:
        names.setdefault(layer, set()).add(name)
    extra = {(layer, name) for layer, here in names.items() for name in added(target, here)}
    counts = {layer: _num_experts(source, layer, here & EXPERTS) for layer, here in names.items()}
    parts = {part: exported.stems(part, counts[part[0]]) for part in sorted(source.stems.keys() | extra)}
    keys = {stem + end for stems in parts.values() for stem in stems for end in exported.ends()}
    problems |= {key: "missing" for key in sorted(keys - exported.file.names)}
    problems |= {key: "unexpected" for key in sorted(exported.file.names - keys)}
    if problem := exported.settings_problem(set(parts)):
        problems["settings"] = problem
    kinds: dict[str, int] = {}
    worst = 0.0
    for seed, (part, stems) in enumerate(parts.items()):
        try:
            wanted = None if part in extra else source.action(part)
            found = exported.action(part, counts[part[0]])
            largest, expert = difference(wanted, found, seed)
        except WrongTensor as error:
            problems.setdefault(*error.args)
            continue
        except Exception as error:  # an unreadable tensor is a finding, not a crash
            problems.setdefault(stems[0], f"{type(error).__name__}: {error}")
            continue
        kinds[part[1]] = kinds.get(part[1], 0) + (0 if part in extra else len(found[0]))
        worst = max(worst, largest)
        if largest > MAX_DIFFERENCE:
            where = stems[expert] if len(stems) > 1 else stems[0]
            which = f" ({part[1]} of expert {expert})" if part[1] in EXPERTS else ""
            problems[where] = f"differs from the source's{which}: relative difference {largest:.2g}"
    return {"problems": problems, "sites": sum(kinds.values()), "kinds": kinds, "zeros": len(extra),
            "max_relative_difference": worst}  # fmt: skip


def _num_experts(source: PeftAdapter, layer: int, experts: set[str]) -> int:
    return len(source.action((layer, min(experts)))[0]) if experts else 0


if __name__ == "__main__":
    with open(sys.argv[1]) as request_file:
        print("RESULT " + json.dumps(compare(json.load(request_file))))

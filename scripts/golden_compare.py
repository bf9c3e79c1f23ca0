"""Compare the output of two commits, for `golden.py`: figures, tensors and bytes; times, paths and versions aside."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetune.results import parse_evaluation, to_json

# Keys of JSON files whose values depend on the clock, the place or the version.
VOLATILE = {
    *("seconds", "minutes", "tokens_per_second", "memory_gib", "peak_memory_gib", "created", "version", "versions"),
    *("finetune_version", "toolkit", "written", "written_by", "command", "files", "estimate"),
}
MANIFEST = ("audit", "adapter_norms", "adapter_parameters", "total_steps", "status", "loop", "data")
TEXT = {".md", ".html", ".yaml", ".txt"}  # free text may be worded otherwise
OWN = {".lock", "metrics.jsonl", "evaluation.json", "manifest.json"}  # compared by themselves, or no result
VOLATILE_FIELDS = re.compile(r"general\.(date|version|source|url)|finetune")


@dataclass(frozen=True)
class Difference:
    """A difference: its place, and both values or their distance."""

    item: str
    detail: str


def compare_runs(reference: Path, tree: Path) -> list[Difference]:
    """Two run directories: metrics, evaluation, adapters, checkpoints, checks."""
    found = list(_metrics(reference / "metrics.jsonl", tree / "metrics.jsonl"))
    found += _json_values(
        "evaluation.json", *(_test_figures(run / "evaluation.json", run) for run in (reference, tree))
    )
    manifests = [_read(run / "manifest.json", run) for run in (reference, tree)]
    kept = [{key: manifest[key] for key in MANIFEST if key in manifest} for manifest in manifests]
    found += _json_values("manifest.json", *kept)
    for folder in ("adapter", "adapter_compact", "checkpoints", "."):
        found += _directories(reference / folder, tree / folder, folder, deep=folder == "checkpoints")
    return found


def _test_figures(path: Path, root: Path) -> Any:
    """Figures of the test set in either form of evaluation.json: version 0.1 had another one."""
    return to_json(parse_evaluation(_read(path, root)).test)


def compare_exports(reference: Path, tree: Path) -> list[Difference]:
    """Two exported directories, file by file."""
    if not reference.exists():
        return [Difference(str(reference), "was not written")]
    return list(_directories(reference, tree, "", deep=True))


def _directories(reference: Path, tree: Path, label: str, *, deep: bool) -> Iterator[Difference]:
    pattern = "**/*" if deep else "*"
    listed = [
        {str(path.relative_to(root)): path for path in root.glob(pattern) if path.is_file()}
        for root in (reference, tree)
    ]
    for name in sorted(listed[0]):
        item, path = f"{label}/{name}".strip("./"), listed[0][name]
        # A later export writes survival reports into the run: with --keep the reference's run may have them already.
        if name in OWN or path.suffix in TEXT or name.startswith("survival-"):
            continue
        if name not in listed[1]:
            yield Difference(item, "is missing")
        elif path.suffix == ".safetensors":
            yield from _tensors(item, path, listed[1][name])
        elif path.suffix == ".gguf":
            yield from _gguf(item, path, listed[1][name])
        elif path.suffix == ".json":
            yield from _json_values(item, _read(path, reference), _read(listed[1][name], tree))
        elif path.read_bytes() != listed[1][name].read_bytes():
            yield Difference(item, "other bytes")


def _metrics(reference: Path, tree: Path) -> Iterator[Difference]:
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (reference, tree)]
    if len(lines[0]) != len(lines[1]):
        yield Difference("metrics.jsonl", f"{len(lines[0])} and {len(lines[1])} lines")
    for number, (one, other) in enumerate(zip(*lines, strict=False), 1):
        yield from _json_values(f"metrics.jsonl line {number}", one, other)


def _read(path: Path, root: Path) -> Any:
    """A JSON file; with the side's own directory replaced by SIDE."""
    side = root
    while side.name not in ("reference", "") and not side.name.startswith("tree-"):
        side = side.parent
    text = path.read_text()
    return json.loads(text.replace(str(side), "SIDE").replace("resumed-from-reference", "resume"))


def _json_values(item: str, one: Any, other: Any) -> Iterator[Difference]:
    """Values that differ between the reference and the tree."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key, value in one.items():
            if key in VOLATILE:
                continue
            if key not in other:
                yield Difference(f"{item}: {key}", "is missing")
            else:
                yield from _json_values(f"{item}: {key}", value, other[key])
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from _json_values(f"{item}[{number}]", *pair)
    elif one != other and not (one != one and other != other):  # two NaN are the same
        yield Difference(item, f"{str(one)[:80]} and {str(other)[:80]}")


def _tensors(item: str, reference: Path, tree: Path) -> Iterator[Difference]:
    if reference.read_bytes() == tree.read_bytes():
        return
    before = 0
    with safe_open(reference, "pt") as one, safe_open(tree, "pt") as other:
        for name in sorted(set(one.keys()) ^ set(other.keys())):
            before += 1
            yield Difference(f"{item}: {name}", "is only in one")
        for name in sorted(set(one.keys()) & set(other.keys())):
            a, b = one.get_tensor(name), other.get_tensor(name)
            if a.dtype != b.dtype or a.shape != b.shape:
                before += 1
                yield Difference(f"{item}: {name}", f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
            elif not torch.equal(_bits(a), _bits(b)):
                before += 1
                yield Difference(f"{item}: {name}", f"differ by {(a.double() - b.double()).abs().max().item():.3g}")
    if not before:
        yield Difference(item, "the same tensors in other bytes (order, metadata)")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _gguf(item: str, reference: Path, tree: Path) -> Iterator[Difference]:
    if reference.read_bytes() == tree.read_bytes():
        return
    import gguf

    one, other = gguf.GGUFReader(reference), gguf.GGUFReader(tree)
    tensors = [{tensor.name: tensor for tensor in reader.tensors} for reader in (one, other)]
    for name in sorted(tensors[0].keys() | tensors[1].keys()):
        a, b = tensors[0].get(name), tensors[1].get(name)
        if a is None or b is None:
            yield Difference(f"{item}: {name}", "is only in one")
        elif a.tensor_type != b.tensor_type or a.data.tobytes() != b.data.tobytes():
            yield Difference(f"{item}: {name}", "other bytes")
    for name in sorted(one.fields.keys() | other.fields.keys()):
        if VOLATILE_FIELDS.search(name):
            continue
        values = [reader.fields[name].contents() if name in reader.fields else None for reader in (one, other)]
        if values[0] != values[1]:
            yield Difference(f"{item}: {name}", f"{str(values[0])[:60]} and {str(values[1])[:60]}")

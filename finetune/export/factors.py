"""Rewriting an adapter's factors without changing the updates they stand for, and the swapped factors of PEFT 0.19.0.

Shape legend: E experts, r rank. Attention and the router: a [r, in], b [out, r]. Experts: a [E, r, in], b [E, out, r].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from finetune.adapters.layout import ATTENTION, EXPERTS, ROUTER, StoredSite
from finetune.adapters.store import AdapterFile
from finetune.arch import Arch
from finetune.errors import InputError
from finetune.kernels.experts import LoraFactors

SWAPPING_RELEASE = "0.19.0"
Layer = Mapping[str, LoraFactors]
"""The factors of one layer by weight name."""


def padded(factors: LoraFactors, rank: int) -> LoraFactors:
    """The same update with zero rows in a and zero columns in b up to a rank. The scale stays.

    Args:
        factors: of at most that rank.
        rank: of the result.
    """
    missing = rank - factors.a.shape[-2]
    if missing < 0:
        raise ValueError(f"rank {factors.a.shape[-2]} cannot be padded to {rank}")
    if not missing:
        return factors
    return LoraFactors(F.pad(factors.a, (0, 0, 0, missing)), F.pad(factors.b, (0, missing)), factors.scale)


def rescaled(factors: LoraFactors, scale: float) -> LoraFactors:
    """The same update under another scale; the quotient is folded into b (rounded once, in float32)."""
    if factors.scale == scale:
        return factors
    return LoraFactors(factors.a, factors.b * (factors.scale / scale), scale)


def part_of(factors: LoraFactors, experts: slice | int, rows: slice = slice(None)) -> LoraFactors:
    """The update of some experts (or of one, two-dimensional), and of some of its output rows."""
    b = factors.b[experts]
    return LoraFactors(factors.a[experts], b if rows == slice(None) else b[..., rows, :].contiguous(), factors.scale)


def split_gate_up(factors: LoraFactors) -> tuple[LoraFactors, LoraFactors]:
    """gate_up_proj's update as those of gate (even outputs) and up (odd ones), which share a."""
    gate, up = (LoraFactors(factors.a, factors.b[:, start::2].contiguous(), factors.scale) for start in (0, 1))
    return gate, up


def join_gate_up(gate: LoraFactors, up: LoraFactors) -> LoraFactors:
    """One update of gate_up_proj from those of gate and up.

    Args:
        gate, up: experts' factors of one scale. With one and the same a their rank stays, else the ranks add up.
    """
    experts, out, rank = gate.b.shape
    shared = torch.equal(gate.a, up.a)
    total = rank if shared else rank + up.b.shape[2]
    b = gate.b.new_zeros(experts, 2 * out, total)
    b[:, 0::2, :rank] = gate.b
    b[:, 1::2, total - up.b.shape[2] :] = up.b
    return LoraFactors(gate.a if shared else torch.cat([gate.a, up.a], dim=1), b, gate.scale)


def with_both_projections(layer: Layer) -> dict[str, LoraFactors]:
    """A layer's factors with zeros for the other expert projection where only one of the two is adapted.

    vLLM 0.32 leaves all expert buffers zero, or fails an assertion, when a file has one projection alone; and PEFT
    calls a lone projection by the same keys whichever it is.
    """
    present = set(EXPERTS) & layer.keys()
    if len(present) != 1:
        return dict(layer)
    (name,) = present
    known = layer[name]
    experts, rank, inputs, out = *known.a.shape, known.b.shape[1]
    # gate_up reads H and writes 2I, down reads I and writes H.
    other_inputs, other_out = (out, 2 * inputs) if name == "down_proj" else (out // 2, inputs)
    zeros = LoraFactors(torch.zeros(experts, rank, other_inputs), torch.zeros(experts, other_out, rank), known.scale)
    (other,) = set(EXPERTS) - present
    filled = {**layer, other: zeros}
    return {key: filled[key] for key in (*(k for k in layer if k not in present), *EXPERTS)}


def ordered(layer: Layer) -> list[tuple[str, LoraFactors]]:
    """A layer's weights in the order of every file: attention, router, experts."""
    return [(name, layer[name]) for name in (*ATTENTION, ROUTER, *EXPERTS) if name in layer]


# ---- PEFT 0.19.0, and only that release, swapped A and B of gpt-oss experts.
# It took transformers' expert weights [E, in, out] for [E, out, in]: A has the rows that belong to `out`, B those of
# `in`. gate_up_proj shows it (in and out differ in every model); down_proj is square in the published ones and does
# not.


def swapped_back(factors: LoraFactors) -> LoraFactors:
    """Experts' factors a [E, r, out] and b [E, in, r] as a [E, r, in] and b [E, out, r]."""
    return LoraFactors(factors.b.mT.contiguous(), factors.a.mT.contiguous(), factors.scale)


def is_swapped(adapter: AdapterFile, arch: Arch | None) -> bool:
    """Whether an adapter's expert factors are swapped as PEFT 0.19.0 wrote them.

    Args:
        adapter: opened.
        arch: of its base; None: widths are compared within the adapter.
    """
    gate_ups = [site for site in adapter.sites if site.name == "gate_up_proj"]
    downs = [site for site in adapter.sites if site.name == "down_proj"]
    by_release = adapter.config.peft_version == SWAPPING_RELEASE
    if gate_ups:
        return _gate_up_is_swapped(gate_ups[0], downs, adapter, arch, by_release)
    if downs and arch is not None and arch.hidden != arch.expert_width:
        return downs[0].inputs == arch.hidden
    return bool(downs) and by_release


def regrouped(factors: LoraFactors) -> LoraFactors:
    """Experts' factors whose B [out, E·r] was read as rank-major, though it is stored expert after expert."""
    experts, out, rank = factors.b.shape
    stored = factors.b.permute(1, 2, 0).reshape(out, -1)  # as it is in the file
    return LoraFactors(factors.a, stored.view(out, experts, rank).transpose(0, 1).contiguous(), factors.scale)


def refuse_swapped(adapter: AdapterFile, arch: Arch | None) -> None:
    """Raise InputError if an adapter's factors are swapped: an export of them would be another update."""
    if is_swapped(adapter, arch):
        raise InputError(
            f"{adapter.directory} has expert factors the wrong way round, as PEFT {SWAPPING_RELEASE} wrote them",
            fix=f"finetune adapter import {adapter.directory} --out NEW, then export NEW",
        )


def _gate_up_is_swapped(
    gate_up: StoredSite, downs: list[StoredSite], adapter: AdapterFile, arch: Arch | None, by_release: bool
) -> bool:
    """gate_up reads H and writes 2I."""
    if arch is not None:
        hidden: int | None = arch.hidden
    elif downs:
        # The right way round down reads I and writes H; swapped, its two widths are exchanged too.
        right = (gate_up.inputs, gate_up.out) == (downs[0].out, 2 * downs[0].inputs)
        wrong = (gate_up.out, gate_up.inputs) == (downs[0].inputs, 2 * downs[0].out)
        if right != wrong:
            return wrong
        return by_release
    else:
        hidden = next((site.inputs for site in adapter.sites if site.name in ("q_proj", "k_proj", "v_proj")), None)
    if hidden is None or gate_up.inputs == gate_up.out:
        return by_release
    return gate_up.inputs != hidden and gate_up.out == hidden

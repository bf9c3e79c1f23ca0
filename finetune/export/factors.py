"""What exporters do to a site's factors without changing the update they stand for.

Shape legend: E experts, r rank. Attention and the router: a [r, in], b [out, r]. Experts: a [E, r, in], b [E, out, r].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.export.source import AdapterSource, Factors


def padded(factors: Factors, rank: int) -> Factors:
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
    return Factors(F.pad(factors.a, (0, 0, 0, missing)), F.pad(factors.b, (0, missing)), factors.scale)


def rescaled(factors: Factors, scale: float) -> Factors:
    """The same update under another scale; what differs is folded into b (rounded once, in float32)."""
    if factors.scale == scale:
        return factors
    return Factors(factors.a, factors.b * (factors.scale / scale), scale)


def gate_and_up(factors: Factors) -> tuple[Factors, Factors]:
    """Split gate_up_proj's update: both read the same a, gate writes the even outputs, up the odd ones."""
    return tuple(Factors(factors.a, factors.b[:, start::2].contiguous(), factors.scale) for start in (0, 1))  # type: ignore[return-value]


def joined_gate_up(gate: Factors, up: Factors) -> Factors:
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
    return Factors(gate.a if shared else torch.cat([gate.a, up.a], dim=1), b, gate.scale)


def with_both_projections(layer: dict[str, Factors]) -> dict[str, Factors]:
    """A layer's factors with zeros for the expert projection that is not adapted, when one of the two is.

    vLLM 0.32 leaves all expert buffers zero, or fails an assertion, when a file holds one projection alone; and PEFT
    calls a lone projection by the same keys whichever it is.
    """
    present = {"gate_up_proj", "down_proj"} & layer.keys()
    if len(present) != 1:
        return layer
    (name,) = present
    known = layer[name]
    experts, rank, inputs, out = *known.a.shape, known.b.shape[1]
    # gate_up reads H and writes 2I, down reads I and writes H.
    other_inputs, other_out = (out, 2 * inputs) if name == "down_proj" else (out // 2, inputs)
    zeros = Factors(torch.zeros(experts, rank, other_inputs), torch.zeros(experts, other_out, rank), known.scale)
    filled = layer | {("down_proj" if name == "gate_up_proj" else "gate_up_proj"): zeros}
    return {key: filled[key] for key in (*(k for k in layer if k not in present), "gate_up_proj", "down_proj")}


def squared_norm(factors: Factors) -> Tensor:
    """Squared Frobenius norm of the update, float64: [] or [E]. Nothing larger than the factors and r x r is formed."""
    a, b = factors.a.double(), factors.b.double()
    gram = (a @ a.mT) * (b.mT @ b)
    return gram.sum((-2, -1)).clamp(min=0) * factors.scale**2


def layers_of(source: AdapterSource) -> list[int]:
    """Numbers of the layers that an adapter changes."""
    return sorted({site.layer for site in source.sites})


def largest_rank(source: AdapterSource) -> int:
    """The highest rank of any site."""
    return max(site.rank for site in source.sites)

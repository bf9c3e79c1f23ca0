"""What exporters do to a site's factors without changing the update they stand for.

Shape legend: E experts, r rank. Attention and the router: a [r, in], b [out, r]. Experts: a [E, r, in], b [E, out, r].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.adapters.store import AdapterFile, Factors, StoredSite
from finetune.arch import Arch
from finetune.errors import InputError


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


def layers_of(source: AdapterFile) -> list[int]:
    """Numbers of the layers that an adapter changes."""
    return sorted({site.layer for site in source.sites})


def largest_rank(source: AdapterFile) -> int:
    """The highest rank of any site."""
    return max(site.rank for site in source.sites)


# PEFT 0.19.0, and only that release, wrote A and B of gpt-oss experts the wrong way round; here they are told apart.
#
# It took transformers' expert weights [E, in, out] for [E, out, in]: A has the rows that belong to `out`, B those of
# `in`. gate_up_proj shows it (in and out differ in every model); down_proj is square in the published ones and does
# not.

SWAPPING_RELEASE = "0.19.0"


def is_swapped(source: AdapterFile, shape: Arch | None) -> bool:
    """Whether an adapter's expert factors are PEFT 0.19.0's.

    Args:
        source: the adapter.
        shape: of its base; None: widths are compared within the adapter.
    """
    gate_ups = [site for site in source.sites if site.name == "gate_up_proj"]
    downs = [site for site in source.sites if site.name == "down_proj"]
    by_release = source.config.get("peft_version") == SWAPPING_RELEASE
    if gate_ups:
        return _gate_up_is_swapped(gate_ups[0], downs, source, shape, by_release)
    if downs and shape is not None and shape.hidden != shape.expert_width:
        return downs[0].inputs == shape.hidden
    return bool(downs) and by_release


def turned(factors: Factors) -> Factors:
    """Experts' factors the other way round: a [E, r, out] and b [E, in, r] become a [E, r, in] and b [E, out, r]."""
    return Factors(factors.b.mT.contiguous(), factors.a.mT.contiguous(), factors.scale)


def refuse_swapped(source: AdapterFile, shape: Arch | None) -> None:
    """Stop at an adapter that would be exported the wrong way round.

    Raises:
        InputError: it is PEFT 0.19.0's.
    """
    if is_swapped(source, shape):
        raise InputError(
            f"{source.directory} holds expert factors the wrong way round, as PEFT {SWAPPING_RELEASE} wrote them",
            fix=f"finetune adapter import {source.directory} --out NEW, then export NEW",
        )


def _gate_up_is_swapped(
    gate_up: StoredSite, downs: list[StoredSite], source: AdapterFile, shape: Arch | None, by_release: bool
) -> bool:
    """gate_up reads H and writes 2I."""
    if shape is not None:
        hidden: int | None = shape.hidden
    elif downs:
        # The right way round down reads I and writes H; turned, its two widths are the other way round too.
        right = (gate_up.inputs, gate_up.out) == (downs[0].out, 2 * downs[0].inputs)
        wrong = (gate_up.out, gate_up.inputs) == (downs[0].inputs, 2 * downs[0].out)
        if right != wrong:
            return wrong
        return by_release
    else:
        hidden = next((site.inputs for site in source.sites if site.name in ("q_proj", "k_proj", "v_proj")), None)
    if hidden is None or gate_up.inputs == gate_up.out:
        return by_release
    return gate_up.inputs != hidden and gate_up.out == hidden

"""PEFT 0.19.0, and only that release, wrote A and B of gpt-oss experts the wrong way round; here they are told apart.

It took transformers' expert weights [E, in, out] for [E, out, in]: A has the rows that belong to `out`, B those of
`in`. gate_up_proj shows it (in and out differ in every model); down_proj is square in the published ones and does not.
"""

from __future__ import annotations

from finetune.errors import InputError
from finetune.export.source import AdapterSource, Factors, SourceSite
from finetune.model.shapes import ModelShape

SWAPPING_RELEASE = "0.19.0"


def is_swapped(source: AdapterSource, shape: ModelShape | None) -> bool:
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


def refuse_swapped(source: AdapterSource, shape: ModelShape | None) -> None:
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
    gate_up: SourceSite, downs: list[SourceSite], source: AdapterSource, shape: ModelShape | None, by_release: bool
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

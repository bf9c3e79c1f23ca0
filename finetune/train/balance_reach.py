"""What the terms on the router can change: routers that are trained, and adapters upstream of some router."""

from __future__ import annotations

from finetune.adapters.sites import Site
from finetune.model.shapes import ModelShape


def balance_reach(sites: list[Site], shape: ModelShape) -> list[Site]:
    """The sites that a loss on the routers' logits has a gradient for.

    A layer's router reads what its own attention and all earlier layers made. So it reaches every attention adapter,
    routers that are trained, and expert adapters of all layers but the last.
    """
    return [site for site in sites if site.kind != "experts" or site.layer < shape.num_layers - 1]


def describe_balance_reach(sites: list[Site], shape: ModelShape, mode: str = "frozen") -> str:
    """Say which adapters the balance loss and the z-loss reach.

    Args:
        sites: of the adapter.
        shape: of the base.
        mode: the recipe's `adapter.router.mode`.
    """
    reached = balance_reach(sites, shape)
    routers = sum(site.kind == "router" for site in reached)
    what = f"{len(reached)} of {len(sites)} adapter sites" + (f", {routers} of them routers" if routers else "")
    text = f"router: {mode}; the balance loss reaches {what}"
    if len(reached) < len(sites):
        text += f" (not the experts of layer {shape.num_layers - 1}: no router comes after them)"
    return text

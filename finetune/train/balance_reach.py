"""What the balance loss can change: with a frozen router, only adapters upstream of some router."""

from __future__ import annotations

from finetune.adapters.sites import Site
from finetune.model.shapes import ModelShape


def describe_balance_reach(sites: list[Site], shape: ModelShape) -> str:
    """Say which adapters the balance loss reaches.

    A layer's router reads what its own attention and all earlier layers made, so with a frozen router the loss reaches
    every attention adapter, and expert adapters of all layers but the last.
    """
    unreached = [site for site in sites if site.kind == "experts" and site.layer == shape.num_layers - 1]
    reached = [site for site in sites if site not in unreached]
    text = f"router: frozen; the balance loss reaches {len(reached)} of {len(sites)} adapter sites"
    if unreached:
        text += f" (not the experts of layer {shape.num_layers - 1}: no router comes after them)"
    return text

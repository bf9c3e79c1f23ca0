"""What each expert's matrices see: weighted mean and second moments of their inputs on calibration rows.

A routed row counts with the square of its router weight, since that is what its error counts in the layer's output. An
expert with fewer rows than input dimensions has moments without full rank; it borrows from the layer, the more the
fewer rows it has: other tokens of the layer are sent through it as well.

Shape legend: T tokens, D hidden, E experts, A active experts a token, R routed rows, F expert width, K in features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.errors import CheckError

_BORROWED_PER_INPUT = 2  # tokens borrowed from the layer for each input dimension


@dataclass(frozen=True)
class LayerInputs:
    """What a layer's experts received, padding left out.

    Attributes:
        x: [T, D], in the compute dtype.
        expert_ids: int64 [T, A].
        weights: [T, A], the router's.
    """

    x: Tensor
    expert_ids: Tensor
    weights: Tensor

    def rows_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens that an expert received, int64 [R], and their squared router weights, float32 [R]."""
        tokens, slots = (self.expert_ids == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, slots].float().square()

    def counts(self, num_experts: int) -> Tensor:
        """Routed rows of each expert, int64 [E], on the CPU."""
        return torch.bincount(self.expert_ids.reshape(-1), minlength=num_experts).cpu()


@dataclass(frozen=True)
class ExpertRows:
    """One expert's calibration rows: own ones first, then those borrowed from the layer.

    Attributes:
        x: float32 [R, D].
        weights: float32 [R], sum 1.
        num_own: how many the router sent.
        mass: sum of their squared router weights: what the expert counts in the layer.
    """

    x: Tensor
    weights: Tensor
    num_own: int
    mass: float


def expert_rows(inputs: LayerInputs, expert: int) -> ExpertRows:
    """Rows of one expert, topped up from the layer if it has fewer than D; none if the router sent it none.

    Own rows keep a share of R / D of the weight then, the borrowed ones get the rest.
    """
    tokens, weights = inputs.rows_of(expert)
    size, own = inputs.x.shape[1], len(tokens)
    mass = float(weights.sum())
    weights = weights / mass if own else weights
    if 0 < own < size:
        count = min(len(inputs.x), _BORROWED_PER_INPUT * size)
        borrowed = torch.arange(count, device=tokens.device) * len(inputs.x) // count  # spread evenly: no seed
        tokens = torch.cat((tokens, borrowed))
        share = own / size
        weights = torch.cat((weights * share, torch.full((count,), (1 - share) / count, device=weights.device)))
    return ExpertRows(inputs.x[tokens].float(), weights, own, mass)


def moments(x: Tensor, weights: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Mean [K] and second moments about it [K, K] of weighted rows.

    Args:
        x: float32 [R, K].
        weights: [R], sum 1 (or R = 0, which gives zeros).
        where: layer, projection and expert, for the error.

    Raises:
        CheckError: a value is not finite.
    """
    mean = weights @ x
    centred = (x - mean) * weights.sqrt()[:, None]
    second = centred.mT @ centred
    if not bool(second.isfinite().all()):
        raise CheckError(
            f"{where}: inputs on calibration rows are not finite",
            why="base + adapter leaves the range of the compute dtype there, so there is nothing to round for",
            fix="evaluate the adapter first (finetune evaluate); round with --rounding nearest to look at the weights",
        )
    return mean, second

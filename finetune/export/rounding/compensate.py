"""Round W + update onto the MXFP4 grid so that the update survives: unit projection, and the mean error for the bias.

The least error shrinks a small update, since most codes do not move. A fine-tune's gain is first-order in what survives
of the update and second-order in noise, so the target W + a · update is amplified (a from 1 to 3, by bisection, for
each expert) until the rounded change, projected on the wanted one in the space of outputs, is 1.

Shape legend: E experts, N out features, K in features, G = K / 32. Matrices are [E, K, N], inputs first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from finetune.export.rounding import grid
from finetune.export.rounding.solve import descend, error_factor, gptq
from finetune.mxfp4.constants import BLOCK, SCALE_BIAS

_FITS_STEPS = 7.0  # up to there a block's own scale is the one that nearest rounding would choose as well
_SCALE_CANDIDATE_MANTISSA = 7 / 8  # of 8 steps: above, 8 of the doubled scale is nearer than 6 (finetune/mxfp4/format)


@dataclass(frozen=True)
class Settings:
    """How hard to try; the defaults won in the measurements of docs/guide/mxfp4.md.

    Attributes:
        damping: of the moments in the error feedback, relative to the mean of their diagonal.
        sweeps: of coordinate descent, at most.
        solves: of the bisection for the amplification; 1 leaves it at 1.
        tolerance: of the projection.
        largest: amplification.
    """

    damping: float = 0.003
    sweeps: int = 6
    solves: int = 5
    tolerance: float = 0.04
    largest: float = 3.0


@dataclass(frozen=True)
class Rounded:
    """What became of E matrices.

    Attributes:
        values: [E, K, N] on the grid of `scales`.
        scales: uint8 [E, N, G].
        wanted: float32 [E], mean square of the wanted change of outputs about their mean; 0 without an update.
        amplification, projection, error: float32 [E]. Projection of the written change on the wanted one, and the norm
            of their difference relative to the wanted one's, both in outputs about their mean; NaN without an update.
        singular: bool [E], the moments had to be damped more.
    """

    values: Tensor
    scales: Tensor
    wanted: Tensor
    amplification: Tensor
    projection: Tensor
    error: Tensor
    singular: Tensor


def compensate(base: Tensor, scales: Tensor, update: Tensor, moments: Tensor, settings: Settings) -> Rounded:
    """Round base + update, each expert until its projection is 1 or nothing more helps.

    Args:
        base: float32 [E, K, N], on the grid of `scales`.
        scales: uint8 [E, N, G].
        update: float32 [E, K, N]. An expert whose update no input excites keeps the base.
        moments: second moments of the inputs about their mean, float32 [E, K, K].
        settings: see there.
    """
    factor, singular = error_factor(moments, settings.damping)
    excited = moments @ update
    wanted = (excited * update).sum((1, 2))
    live = wanted > 0
    steps = grid.steps(scales)
    problem = _Problem(base, update, moments, factor, steps)
    best, best_steps = base.clone(), steps.clone()
    projection, amplification = torch.zeros_like(wanted), torch.ones_like(wanted)
    search = _Search(len(wanted), settings, wanted.device)
    active = live.nonzero()[:, 0]
    for _ in range(settings.solves):
        if not len(active):
            break
        part, tried = problem.of(active), search.next[active]
        values, taken = part.solve(tried, settings)
        found = ((values - part.base) * excited[active]).sum((1, 2)) / wanted[active]
        better = (found - 1).abs() < (projection[active] - 1).abs()
        kept = active[better]
        best[kept], best_steps[kept] = values[better], taken[better]
        projection[kept], amplification[kept] = found[better], tried[better]
        done = ((found - 1).abs() < settings.tolerance) | ((tried == 1) & (found > 1))
        done |= (tried == settings.largest) & (found < 1)
        search.note(active, tried, found)
        active = active[~done]
    left = best - base - update
    error = (((moments @ left) * left).sum((1, 2)).clamp_min(0) / wanted).sqrt()
    nothing = torch.full_like(error, torch.nan)
    new_scales = torch.where(best_steps == steps, scales.mT, _scale_bytes(best_steps)).mT.contiguous()
    return Rounded(
        best,
        new_scales,
        wanted,
        amplification,
        torch.where(live, projection, nothing),
        torch.where(live, error, nothing),
        singular,
    )


class _Search:
    """The amplification to try next, for each of E experts: 1, then in proportion, then between what bracketed 1."""

    def __init__(self, num_experts: int, settings: Settings, device: torch.device) -> None:
        self.largest = settings.largest
        self.next = torch.ones(num_experts, device=device)
        self._low, self._high = torch.ones_like(self.next), torch.full_like(self.next, settings.largest)
        self._found_low, self._found_high = torch.zeros_like(self.next), torch.full_like(self.next, torch.inf)

    def note(self, active: Tensor, tried: Tensor, found: Tensor) -> None:
        """Remember the projections found for some experts."""
        short, over = active[found < 1], active[found >= 1]
        self._low[short], self._found_low[short] = tried[found < 1], found[found < 1]
        self._high[over], self._found_high[over] = tried[found >= 1], found[found >= 1]
        low, high = self._low[active], self._high[active]
        slope = (self._found_high[active] - self._found_low[active]) / (high - low).clamp_min(1e-6)
        between = low + (1 - self._found_low[active]) / slope
        beyond = (low / self._found_low[active].clamp_min(1e-6)).clamp(max=self.largest)
        guess = torch.where(self._found_high[active].isinf(), beyond, between)
        # A step too near to an end would learn nothing: half of the way is the worst that bisection does.
        margin = 0.1 * (high - low)
        self.next[active] = torch.where(guess == self.largest, guess, guess.clamp(low + margin, high - margin))


@dataclass(frozen=True)
class _Problem:
    """Matrices to round: base and update [E, K, N], moments and error factor [E, K, K], steps [E, G, N]."""

    base: Tensor
    update: Tensor
    moments: Tensor
    factor: Tensor
    steps: Tensor

    def of(self, active: Tensor) -> _Problem:
        """Some experts' problem; no copy where it is all of them."""
        if len(active) == len(self.base):
            return self
        return _Problem(*(getattr(self, each.name)[active] for each in fields(self)))

    def solve(self, amplification: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        """Rounded values [E, K, N] of base + amplification · update, and their steps."""
        target = torch.addcmul(self.base, self.update, amplification[:, None, None])
        values, taken = gptq(target, self.factor, self.steps, _wider(target, self.steps))
        return descend(values, target, self.moments, taken, settings.sweeps), taken


def _wider(target: Tensor, steps: Tensor) -> Tensor:
    """Steps [E, G, N] that blocks may take: where values outgrew one, that which nearest rounding would choose."""
    largest = target.unflatten(1, (-1, BLOCK)).abs().amax(2)
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - 3 + (mantissa > _SCALE_CANDIDATE_MANTISSA).to(exponent.dtype)
    return torch.where(largest > _FITS_STEPS * steps, torch.exp2(exponent.float()), steps)


def _scale_bytes(steps: Tensor) -> Tensor:
    return (torch.log2(steps).round() + SCALE_BIAS).clamp(0, 255).to(torch.uint8)

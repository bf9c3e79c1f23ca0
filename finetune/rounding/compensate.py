"""Round W + update onto the MXFP4 grid so that the update survives: GPTQ, coordinate descent and unit projection.

For inputs x with second moments H = E[x x'], rounding T to Q costs tr((Q - T)' H (Q - T)) in the outputs. GPTQ rounds
one input column after the other and pushes each column's error onto those still to come; coordinate descent then gives
every value, in turn, the best code with all others fixed. Output features do not interact, so all rows of all experts
are solved at once.

The least error shrinks a small update, since most codes do not move. A fine-tune's gain is first-order in what survives
of the update and second-order in noise, so the target W + a · update is amplified (a from 1 to 3, by bisection, for
each expert) until the rounded change, projected on the wanted one in the space of outputs, is 1.

Sources: GPTQ, arXiv 2210.17323; the measurements behind the settings are in docs/guide/mxfp4.md.
Shape legend: E experts, N out features, K in features, G = K / 32. Matrices are [E, K, N], inputs first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from finetune.mxfp4.format import BLOCK, SCALE_BIAS
from finetune.rounding import grid

_FITS_STEPS = 7.0  # up to here nearest rounding would choose a block's own scale as well
_SCALE_CANDIDATE_MANTISSA = 7 / 8  # of 8 steps: above, 8 of the doubled scale is nearer than 6 (finetune/mxfp4/format)


@dataclass(frozen=True)
class Settings:
    """Effort of the solver; the defaults won in the measurements of docs/guide/mxfp4.md.

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
    """E rounded matrices.

    Attributes:
        values: [E, K, N] on the grid of `scales`.
        scales: uint8 [E, N, G].
        wanted: float32 [E], mean square of the wanted change of outputs about their mean; 0 without an update.
        amplification, projection, error: float32 [E]. Projection of the written change on the wanted one, and the norm
            of their difference relative to the wanted one's, both in outputs about their mean; NaN without an update.
        singular: bool [E], the moments needed more damping.
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
        settings: of the solver.
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
        part, tried = problem.select(active), search.next[active]
        values, taken = part.solve(tried, settings)
        found = ((values - part.base) * excited[active]).sum((1, 2)) / wanted[active]
        better = (found - 1).abs() < (projection[active] - 1).abs()
        kept = active[better]
        best[kept], best_steps[kept] = values[better], taken[better]
        projection[kept], amplification[kept] = found[better], tried[better]
        done = ((found - 1).abs() < settings.tolerance) | ((tried == 1) & (found > 1))
        done |= (tried == settings.largest) & (found < 1)
        search.update(active, tried, found)
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

    def update(self, active: Tensor, tried: Tensor, found: Tensor) -> None:
        """Take the projections found for some experts into account."""
        short, over = active[found < 1], active[found >= 1]
        self._low[short], self._found_low[short] = tried[found < 1], found[found < 1]
        self._high[over], self._found_high[over] = tried[found >= 1], found[found >= 1]
        low, high = self._low[active], self._high[active]
        slope = (self._found_high[active] - self._found_low[active]) / (high - low).clamp_min(1e-6)
        between = low + (1 - self._found_low[active]) / slope
        beyond = (low / self._found_low[active].clamp_min(1e-6)).clamp(max=self.largest)
        guess = torch.where(self._found_high[active].isinf(), beyond, between)
        # A guess too near to an end would learn nothing: half of the way is the worst that bisection does.
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

    def select(self, active: Tensor) -> _Problem:
        """The problem of some experts; no copy if it is all of them."""
        if len(active) == len(self.base):
            return self
        return _Problem(*(getattr(self, each.name)[active] for each in fields(self)))

    def solve(self, amplification: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        """Rounded values [E, K, N] of base + amplification · update, and their steps."""
        target = torch.addcmul(self.base, self.update, amplification[:, None, None])
        values, taken = gptq(target, self.factor, self.steps, _wider(target, self.steps))
        return descend(values, target, self.moments, taken, settings.sweeps), taken


def _wider(target: Tensor, steps: Tensor) -> Tensor:
    """Steps [E, G, N] that blocks may take: where values outgrew a step, the one nearest rounding would choose."""
    largest = target.unflatten(1, (-1, BLOCK)).abs().amax(2)
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - 3 + (mantissa > _SCALE_CANDIDATE_MANTISSA).to(exponent.dtype)
    return torch.where(largest > _FITS_STEPS * steps, torch.exp2(exponent.float()), steps)


def _scale_bytes(steps: Tensor) -> Tensor:
    return (torch.log2(steps).round() + SCALE_BIAS).clamp(0, 255).to(torch.uint8)


def error_factor(moments: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Upper triangular U with U'U = (H + damping · mean(diag H) · I)^-1, and which H needed more damping.

    Args:
        moments: H, float32 [E, K, K], symmetric, positive semi-definite up to rounding.
        damping: relative to the mean of the diagonal.

    Returns:
        float32 [E, K, K], and bool [E]: not positive definite with this damping. Those get ten times as much until they
        are, and a diagonal factor in the end.
    """
    exact = moments.double()
    size = exact.shape[-1]
    level = exact.diagonal(dim1=-2, dim2=-1).mean(-1)
    level = torch.where(level > 0, level, 1.0)  # no inputs: any factor will do, nothing is rounded with it
    eye = torch.eye(size, dtype=torch.float64, device=moments.device)
    shares = torch.full_like(level, damping)
    singular = torch.zeros(len(level), dtype=torch.bool, device=moments.device)
    for _ in range(4):
        lower, info = torch.linalg.cholesky_ex(exact + (shares * level)[:, None, None] * eye)
        failed = info > 0
        if not bool(failed.any()):
            break
        singular |= failed
        shares = torch.where(failed, shares * 10, shares)
    else:
        diagonal = torch.diag_embed(exact.diagonal(dim1=-2, dim2=-1).clamp_min(0) + level[:, None])
        lower = torch.where(failed[:, None, None], diagonal.sqrt(), lower)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float(), singular


def gptq(target: Tensor, factor: Tensor, steps: Tensor, wider: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round with error feedback.

    Args:
        target: float32 [E, K, N].
        factor: [E, K, K] from `error_factor`.
        steps: [E, G, N].
        wider: [E, G, N], other steps that blocks may take if that leaves a smaller error; equal to `steps` where they
            may not. None: nowhere.

    Returns:
        Rounded values [E, K, N], and the steps of their grid.
    """
    rest, rounded, taken = target.clone(), torch.empty_like(target), steps.clone()
    for group, start in enumerate(range(0, target.shape[1], BLOCK)):
        span, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
        local = factor[:, span, span]
        values, errors = _round_block(rest[:, span], local, steps[:, group])
        if wider is not None and bool((wider[:, group] != steps[:, group]).any()):
            other_values, other_errors = _round_block(rest[:, span], local, wider[:, group])
            better = other_errors.square().sum(1) < errors.square().sum(1)
            taken[:, group] = torch.where(better, wider[:, group], steps[:, group])
            values = torch.where(better[:, None], other_values, values)
            errors = torch.where(better[:, None], other_errors, errors)
        rounded[:, span] = values
        if start + BLOCK < target.shape[1]:
            rest[:, later].baddbmm_(factor[:, span, later].mT, errors, alpha=-1)
    return rounded, taken


def _round_block(columns: Tensor, factor: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Round 32 columns [E, 32, N] in order; their values and their errors in units of the factor's diagonal."""
    rest, values, errors = columns.clone(), torch.empty_like(columns), torch.empty_like(columns)
    for j in range(BLOCK):
        values[:, j] = grid.nearest(rest[:, j], step)
        errors[:, j] = (rest[:, j] - values[:, j]) / factor[:, j, j, None]
        if j + 1 < BLOCK:
            rest[:, j + 1 :].addcmul_(factor[:, j, j + 1 :, None], errors[:, j, None], value=-1)
    return values, errors


def descend(rounded: Tensor, target: Tensor, moments: Tensor, steps: Tensor, sweeps: int) -> Tensor:
    """Give each value its best code with all others fixed, column by column, until nothing moves.

    Args:
        rounded: [E, K, N] on the grid, the starting point.
        target: [E, K, N].
        moments: H, [E, K, K].
        steps: [E, G, N].
        sweeps: passes over all columns at most.

    Returns:
        [E, K, N]; its error in outputs is never above the starting point's.
    """
    rounded = rounded.clone()
    curvature = moments.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(sweeps):
        moved = torch.zeros((), dtype=torch.bool, device=rounded.device)
        for group, start in enumerate(range(0, rounded.shape[1], BLOCK)):
            span = slice(start, start + BLOCK)
            gradient = moments[:, span] @ (rounded - target)  # [E, 32, N]
            local = moments[:, span, span]
            for j in range(BLOCK):
                old = rounded[:, start + j]
                best = grid.nearest(old - gradient[:, j] / curvature[:, start + j, None], steps[:, group])
                change = best - old
                gradient.addcmul_(local[:, j, :, None], change[:, None])
                rounded[:, start + j] = best
                moved |= change.any()
        if not bool(moved):
            break
    return rounded

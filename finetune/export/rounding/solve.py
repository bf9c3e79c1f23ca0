"""Round matrices onto the MXFP4 grid so that their outputs, not their weights, stay near the target's.

For inputs x with second moments H = E[x x'], rounding T to Q costs tr((Q - T)' H (Q - T)). GPTQ rounds one input column
after the other and pushes each column's error onto those still to come; coordinate descent then gives every value, in
turn, the best code with all others held. Output features do not interact, so all rows of all experts go at once.

Sources: GPTQ, arXiv 2210.17323; the measurements behind the settings are in docs/guide/mxfp4.md.

Shape legend: E experts, N out features, K in features, G = K / 32. Matrices are [E, K, N], inputs first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.export.rounding.grid import nearest
from finetune.mxfp4.constants import BLOCK


def error_factor(moments: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Upper triangular U with U'U = (H + damping · mean(diag H) · I)^-1, and which H needed more damping.

    Args:
        moments: float32 [E, K, K], symmetric, positive semi-definite up to rounding.
        damping: relative to the mean of the diagonal.

    Returns:
        float32 [E, K, K], and bool [E]: not positive definite with this damping. Those get ten times as much until they
        are, and a diagonal one in the end.
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
        Rounded values [E, K, N], and the steps they lie on.
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
    """32 columns [E, 32, N] in order; their values and their errors in units of the factor's diagonal."""
    rest, values, errors = columns.clone(), torch.empty_like(columns), torch.empty_like(columns)
    for j in range(BLOCK):
        values[:, j] = nearest(rest[:, j], step)
        errors[:, j] = (rest[:, j] - values[:, j]) / factor[:, j, j, None]
        if j + 1 < BLOCK:
            rest[:, j + 1 :].addcmul_(factor[:, j, j + 1 :, None], errors[:, j, None], value=-1)
    return values, errors


def descend(rounded: Tensor, target: Tensor, moments: Tensor, steps: Tensor, sweeps: int) -> Tensor:
    """Give each value its best code with all others held, column by column, until nothing moves.

    Args:
        rounded: [E, K, N] on the grid, where to start.
        target: [E, K, N].
        moments: H, [E, K, K].
        steps: [E, G, N].
        sweeps: passes over all columns at most.

    Returns:
        [E, K, N]; its error in outputs is never above the start's.
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
                best = nearest(old - gradient[:, j] / curvature[:, start + j, None], steps[:, group])
                change = best - old
                gradient.addcmul_(local[:, j, :, None], change[:, None])
                rounded[:, start + j] = best
                moved |= change.any()
        if not bool(moved):
            break
    return rounded

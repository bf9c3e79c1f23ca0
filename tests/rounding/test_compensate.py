"""Compensated rounding: the grid, the solvers, unit projection and moments, against oracles in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.errors import CheckError
from finetune.mxfp4.format import quantise
from finetune.rounding import grid
from finetune.rounding.calibration import LayerInputs, expert_inputs, moments
from finetune.rounding.compensate import Settings, compensate, descend, error_factor, gptq

CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
EXPERTS, OUT, INPUTS = 2, 24, 64


def layer(seed: int, size: float, spectrum: str = "falling") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Blocks, scales, base [E, K, N] on the grid, an update of some relative size, and moments [E, K, K]."""
    generator = torch.Generator().manual_seed(seed)
    blocks, scales = quantise(torch.randn(EXPERTS, OUT, INPUTS, generator=generator) * 0.02)
    base = grid.values(blocks, scales)
    down, up = torch.randn(EXPERTS, INPUTS, 3, generator=generator), torch.randn(EXPERTS, 3, OUT, generator=generator)
    update = down @ up
    update *= (size * base.flatten(1).norm(dim=1) / update.flatten(1).norm(dim=1))[:, None, None]
    decay = torch.ones(INPUTS) if spectrum == "white" else 1.0 / torch.arange(1, INPUTS + 1)
    basis = torch.linalg.qr(torch.randn(EXPERTS, INPUTS, INPUTS, generator=generator))[0]
    rows = torch.randn(EXPERTS, 4096, INPUTS, generator=generator) * decay @ basis.mT
    return blocks, scales, base, update, rows.mT @ rows / 4096


def cost(rounded: Tensor, target: Tensor, second: Tensor) -> Tensor:
    left = (rounded - target).double()
    return ((second.double() @ left) * left).sum((1, 2))


def projection(rounded: Tensor, base: Tensor, update: Tensor, second: Tensor) -> Tensor:
    excited = second.double() @ update.double()
    return ((rounded - base).double() * excited).sum((1, 2)) / (excited * update).sum((1, 2))


def test_nearest_and_neighbours_against_every_code() -> None:
    target = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0])]) / 16
    values = torch.cat((CODES, -CODES)) / 16
    found = grid.nearest(target, torch.tensor(1 / 16))
    best = (values - target[:, None].double()).abs().amin(1)
    assert ((found - target).abs() <= best + 1e-9).all()
    assert (grid.nearest(torch.tensor([0.25, 0.75, 2.5, 5.0]), torch.ones(())) == torch.tensor([0, 1, 2, 4])).all()
    inner, outer = grid.neighbours(target, torch.tensor(1 / 16))
    inside = target.abs() <= 6 / 16
    assert (inner.abs() <= target.abs() + 1e-9).all() and (outer.abs() >= target.abs() - 1e-9)[inside].all()
    apart = (inner != outer) & inside
    codes = [torch.isin(side.abs().double() * 16, CODES) for side in (inner, outer)]
    assert (
        codes[0].all()
        and codes[1].all()
        and not ((values[None] > inner[apart, None]) & (values < outer[apart, None])).any()
    )


def test_encoding_values_gives_back_every_byte() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), generator=generator, dtype=torch.uint8)  # -0 among the codes
    scales = torch.randint(100, 140, (2, 5, 3), generator=generator, dtype=torch.uint8)
    assert torch.equal(grid.encode(grid.values(blocks, scales), scales, blocks, scales), blocks)
    moved = grid.values(blocks, scales)
    moved[0, 7, 2] = -3.0 * torch.exp2(scales[0, 2, 0].float() - 127)
    changed = grid.encode(moved, scales, blocks, scales)
    assert torch.equal(grid.values(changed, scales), moved) and int((changed != blocks).sum()) <= 1


def test_gptq_equals_the_published_recursion() -> None:
    """Oracle: one matrix, one column at a time, the inverse downdated by Gaussian elimination, in float64."""
    _, scales, base, update, second = layer(0, 0.05)
    target = base + update
    factor, singular = error_factor(second, 0.01)
    found, taken = gptq(target, factor, grid.steps(scales))
    assert not singular.any() and torch.equal(taken, grid.steps(scales))
    for expert in range(EXPERTS):
        inverse = second[expert].double()
        inverse = torch.linalg.inv(inverse + 0.01 * inverse.diagonal().mean() * torch.eye(INPUTS))
        rest, expected = target[expert].double().clone(), torch.zeros(INPUTS, OUT, dtype=torch.float64)
        for j in range(INPUTS):
            step = grid.steps(scales)[expert, j // 32].double()
            signed = torch.cat((CODES, -CODES))[:, None] * step
            expected[j] = signed.gather(0, (signed - rest[j]).abs().argmin(0)[None])[0]
            rest -= inverse[:, j, None] * ((rest[j] - expected[j]) / inverse[j, j])[None]
            inverse = inverse - inverse[:, j, None] @ inverse[None, j] / inverse[j, j]
            rest[j] = expected[j]
        assert ((found[expert] - expected).abs() > 1e-6).float().mean() < 0.01  # a tie may fall the other way


def test_without_correlations_gptq_is_nearest_and_with_them_it_is_better() -> None:
    _, scales, base, update, second = layer(1, 0.05)
    steps, target = grid.steps(scales), base + update
    plain = grid.nearest(target, steps.repeat_interleave(32, dim=1))
    white = torch.eye(INPUTS).expand(EXPERTS, -1, -1).contiguous()
    assert torch.equal(gptq(target, error_factor(white, 0.003)[0], steps)[0], plain)
    better, _ = gptq(target, error_factor(second, 0.003)[0], steps)
    assert (cost(better, target, second) < 0.7 * cost(plain, target, second)).all()


def test_descent_ends_where_no_single_code_helps() -> None:
    _, scales, base, update, second = layer(2, 0.05)
    steps, target = grid.steps(scales), base + update
    start, _ = gptq(target, error_factor(second, 0.003)[0], steps)
    found = descend(start, target, second, steps, sweeps=60)
    assert (cost(found, target, second) < cost(start, target, second)).all()
    gradient = second.double() @ (found - target).double()
    curvature = second.double().diagonal(dim1=1, dim2=2)[:, :, None]
    for code in torch.cat((CODES, -CODES)):
        change = code * steps.repeat_interleave(32, dim=1).double() - found.double()
        assert (2 * gradient * change + curvature * change.square() > -1e-7 * cost(found, target, second).max()).all()


@pytest.mark.parametrize("size", [0.01, 0.04, 0.1])
def test_an_update_survives_where_nearest_rounding_erases_it(size: float) -> None:
    _, scales, base, update, second = layer(3, size)
    found = compensate(base, scales, update, second, Settings())
    assert (projection(found.values, base, update, second) - 1).abs().max() < 0.041
    assert torch.allclose(found.projection.double(), projection(found.values, base, update, second), atol=1e-4)
    wanted = ((second @ update) * update).sum((1, 2))
    error = (cost(found.values, base + update, second) / wanted).sqrt()
    assert torch.allclose(found.error.double(), error, rtol=1e-3)
    nearest = grid.nearest(base + update, grid.steps(scales).repeat_interleave(32, dim=1))
    if size > 0.01:  # a smaller update keeps its direction only amidst noise of its own size
        assert (error < (cost(nearest, base + update, second) / wanted).sqrt()).all()
    else:
        assert (projection(nearest, base, update, second) < 0.5).all()


def test_experts_are_independent_and_the_result_is_deterministic() -> None:
    _, scales, base, update, second = layer(4, 0.02)
    together = compensate(base, scales, update, second, Settings())
    again = compensate(base, scales, update, second, Settings())
    assert torch.equal(together.values, again.values) and torch.equal(together.scales, again.scales)
    for one in range(EXPERTS):
        part = slice(one, one + 1)
        alone = compensate(base[part], scales[part], update[part], second[part], Settings())
        assert ((alone.values - together.values[part]) != 0).float().mean() < 0.01


def test_an_update_of_zero_or_constant_inputs_change_no_value() -> None:
    _, scales, base, update, second = layer(5, 0.1)
    for change, moment in ((torch.zeros_like(update), second), (update, torch.zeros_like(second))):
        found = compensate(base, scales, change, moment, Settings())
        assert torch.equal(found.values, base) and torch.equal(found.scales, scales) and found.projection.isnan().all()


def test_a_white_spectrum_is_reported_as_hopeless() -> None:
    _, scales, base, update, second = layer(6, 0.003, "white")
    found = compensate(base, scales, update, second, Settings())
    assert (found.projection < 0.9).all() or (found.error > 1).all()
    assert torch.allclose(found.projection.double(), projection(found.values, base, update, second), atol=1e-4)


def test_a_block_that_outgrows_its_scale_may_take_another() -> None:
    _, scales, base, _, second = layer(7, 0.0)
    update = torch.zeros_like(base)
    update[:, :8] = (
        4 * base.abs().amax() * torch.randn(EXPERTS, 8, OUT, generator=torch.Generator().manual_seed(0)).sign()
    )
    found = compensate(base, scales, update, second, Settings())
    wider = (found.scales > scales).any(-1)
    assert wider.any() and torch.equal(found.scales[..., 1], scales[..., 1])  # only the block that grew
    assert torch.isin(
        (found.values / grid.steps(found.scales).repeat_interleave(32, dim=1)).abs().double(), CODES
    ).all()
    same_scale = gptq(base + update, error_factor(second, 0.003)[0], grid.steps(scales))[0]
    assert (cost(found.values, base + update, second) < cost(same_scale, base + update, second)).all()


def test_singular_moments_are_damped_more_and_reported() -> None:
    _, scales, base, update, second = layer(8, 0.05)
    second = second.clone()
    second[1] -= 0.01 * second[1].diagonal().mean() * torch.eye(INPUTS)  # float errors can do this
    found = compensate(base, scales, update, second, Settings(damping=1e-6))
    assert found.singular.tolist() == [False, True] and found.values.isfinite().all()


def inputs(counts: list[int], size: int = 8) -> LayerInputs:
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])[:, None]
    x = torch.randn(len(ids), size, generator=generator) + 3
    return LayerInputs(x, ids, torch.rand(len(ids), 1, generator=generator) + 0.1)


def test_moments_are_weighted_by_the_square_of_the_routers_weight() -> None:
    given = inputs([40, 20])
    own = expert_inputs(given, 1)
    mean, second = moments(own.x, own.weights, "here")
    x, weights = given.x[40:].double().numpy(), given.weights[40:, 0].double().numpy() ** 2
    assert own.num_own == 20 and own.mass == pytest.approx(weights.sum(), rel=1e-5)
    assert np.allclose(mean.numpy(), np.average(x, axis=0, weights=weights), atol=1e-5)
    assert np.allclose(second.numpy(), np.cov(x.T, aweights=weights, bias=True), atol=1e-5)


def test_a_rare_expert_borrows_from_the_layer_and_one_without_tokens_gets_none() -> None:
    given = inputs([60, 2, 0], size=8)
    rare = expert_inputs(given, 1)
    assert rare.num_own == 2 and len(rare.x) == 2 + 16 and float(rare.weights.sum()) == pytest.approx(1)
    assert float(rare.weights[:2].sum()) == pytest.approx(2 / 8)
    _, second = moments(rare.x, rare.weights, "here")
    assert int(torch.linalg.matrix_rank(second)) == 8
    nothing = expert_inputs(given, 2)
    mean, second = moments(nothing.x, nothing.weights, "here")
    assert nothing.num_own == 0 and not mean.any() and not second.any()


def test_inputs_that_are_not_finite_are_named() -> None:
    x = torch.ones(4, 3)
    x[2, 1] = torch.inf
    with pytest.raises(CheckError, match=r"layers\.3 .* not finite"):
        moments(x, torch.full((4,), 0.25), "model.layers.3 gate_up")

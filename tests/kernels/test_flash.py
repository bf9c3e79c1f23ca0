"""Flash attention with sinks against a dense softmax in float64, on the CPU kernel; choice of the kernel."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_attention_reference import HEADS, KEY_HEADS, PACKED, TREE, WIDTH, allowed_pairs, dense
from torch import Tensor

from finetune.errors import MachineError
from finetune.kernels import flash
from finetune.kernels.attention import AttentionPlan, plan_attention, sink_attention
from finetune.kernels.choice import AttentionDims, choose_attention_kernel, flash_difference
from finetune.kernels.flash import CudaFlash, FlashPlan, _FlashSinkAttention, flash_sink_attention

SHAPE = AttentionDims(heads=4, key_heads=2, width=16, window=24)
CPU = torch.device("cpu")


def ragged(seed: int) -> tuple[list[int], list[int], list[int]]:
    """Segments of random lengths, one-token ones among them; every fourth continues the one before it."""
    g = torch.Generator().manual_seed(seed)
    segments, positions, prefixes, lengths = [], [], [], []
    for number in range(9):
        length = int(torch.randint(1, 14, (1,), generator=g)) if number % 3 else 1
        prefix = number - 1 if number % 4 == 3 else number
        first = 0 if prefix == number else lengths[prefix]
        segments += [number] * length
        positions += range(first, first + length)
        prefixes += [prefix] * length
        lengths.append(length)
    return segments, positions, prefixes


def inputs(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(count, HEADS, WIDTH), (count, KEY_HEADS, WIDTH), (count, KEY_HEADS, WIDTH), (HEADS,)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def plan_of(layout: tuple[list[int], list[int], list[int]], window: int | None) -> AttentionPlan:
    segments, positions, prefixes = (torch.tensor([values]) for values in layout)
    return plan_attention(segments, positions, window, prefixes=prefixes)


LAYOUTS = {
    "packed": (*PACKED, PACKED[0]),
    "tree": TREE,
    **{f"ragged {seed}": ragged(seed) for seed in range(3)},
}


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients_equal_the_dense_softmax(
    layout: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "_CPU_QUERIES", 5)
    segments, positions, prefixes = LAYOUTS[layout]
    leaves = inputs(len(segments))
    plan = plan_of(LAYOUTS[layout], window)
    assert plan.packed is not None
    out = flash_sink_attention(*leaves, plan, WIDTH**-0.5)
    exact = dense(*leaves, allowed_pairs(segments, positions, window, prefixes))
    assert (out - exact).abs().max() < 1e-13
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, wanted in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(exact, leaves, grad), strict=True
    ):
        assert (ours - wanted).abs().max() < 1e-12


def without_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    return out, lse


def only_the_output(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    return out * torch.sigmoid(lse - sinks[:, None]).T[..., None], lse


@pytest.mark.parametrize("wrong", [without_sinks, only_the_output])
def test_a_missing_sink_is_detected(wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: no correction at all, or one that the backward pass does not apply."""
    leaves, plan = inputs(len(PACKED[0])), plan_of(LAYOUTS["packed"], 4)
    right = flash_sink_attention(*leaves, plan, WIDTH**-0.5)
    right_grad = torch.autograd.grad(right.square().sum(), leaves[0])[0]
    monkeypatch.setattr(flash, "with_sinks", wrong)
    out = flash_sink_attention(*leaves, plan, WIDTH**-0.5)
    grad = torch.autograd.grad(out.square().sum(), leaves[0])[0]
    assert torch.allclose(out, right) == (wrong is only_the_output)
    assert (grad - right_grad).abs().max() > 0.01


def test_an_example_does_not_depend_on_its_neighbours() -> None:
    """Outputs of an example do not depend on earlier examples of the sequence, bit for bit."""
    q, k, v, sinks = inputs(30, dtype=torch.float32)
    layout = ([0] * 12 + [1] * 18, [*range(12), *range(18)], [0] * 12 + [1] * 18)
    out = flash_sink_attention(q, k, v, sinks, plan_of(layout, 6), 0.3)
    with torch.no_grad():
        for x in (q, k, v):
            x[:12] = 7.0
    again = flash_sink_attention(q, k, v, sinks, plan_of(layout, 6), 0.3)
    assert torch.equal(out[12:], again[12:]) and not torch.equal(out[:12], again[:12])


def test_positions_with_gaps_use_the_reference() -> None:
    """A kernel counts its window in tokens; positions with gaps need another window, and the plan records that."""
    layout = ([0] * 20, [*range(10), *range(10)], [0] * 20)
    leaves = inputs(20)
    assert plan_of(layout, None).packed is not None
    plan = plan_of(layout, 4)
    assert plan.packed is None
    out = flash_sink_attention(*leaves, plan, 0.3)
    assert torch.equal(out, sink_attention(*leaves, plan, 0.3))


def test_shared_prefixes_copy_only_keys_within_the_window() -> None:
    assert plan_of(TREE, None).packed.key_lengths == (9, 12, 13, 11, 5, 8)
    assert plan_of(TREE, 4).packed.key_lengths == (9, 6, 7, 5, 5, 6)
    starts = plan_of(TREE, 4).packed.key_starts.tolist()
    assert [b - a for a, b in pairwise(starts)] == [9, 6, 7, 5, 5, 6]


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("lengths", [(1, 60, 39), (1, 1, 1)])
def test_gpu_operators_accept_the_arguments_without_synchronising(
    lengths: tuple[int, int, int], window: int | None
) -> None:
    """Their declared arguments and shapes, on tensors without storage, where reading a value raises.

    Numbers need a GPU (tests/model/test_gpu.py). The third segment continues the second.
    """
    segments = torch.repeat_interleave(torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    positions[segments == 2] += lengths[1]
    plan = plan_attention(segments, positions, window, prefixes=torch.where(segments == 2, 1, segments))
    count = sum(lengths)
    shapes = [(count, 4, 16), (count, 2, 16), (count, 2, 16), (4,)]
    leaves = [torch.empty(shape, device="meta", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    flash_plan = FlashPlan(plan.to(torch.device("meta")).packed, window, 0.25)
    out = _FlashSinkAttention.apply(*leaves, flash_plan, CudaFlash())
    grads = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert out.shape == leaves[0].shape and [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    with pytest.raises(RuntimeError):
        out.sum().item()  # the control: waiting for a value does raise here


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 0.015), (torch.float64, 1e-13)])
def test_the_comparison_at_start_up_measures_rounding_only(dtype: torch.dtype, limit: float) -> None:
    assert flash_difference(SHAPE, CPU, dtype) < limit


def test_a_wrong_kernel_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_attention_kernel("auto", SHAPE, CPU, torch.float32).kernel == "flash"
    monkeypatch.setattr(flash, "with_sinks", only_the_output)
    choice = choose_attention_kernel("auto", SHAPE, CPU, torch.float32)
    assert choice.kernel == "reference" and "differ from the reference's by" in choice.reason
    with pytest.raises(MachineError, match="is flash, but its results differ") as error:
        choose_attention_kernel("flash", SHAPE, CPU, torch.float32)
    assert error.value.exit_code == 5
    assert choose_attention_kernel("reference", SHAPE, CPU, torch.float32).kernel == "reference"


@pytest.mark.parametrize(
    ("capability", "built", "dtype", "reason"),
    [
        ((7, 5), True, torch.bfloat16, "Ampere GPU or newer"),
        ((9, 0), False, torch.bfloat16, "was built without it"),
        ((9, 0), True, torch.float32, "bfloat16 or float16, not float32"),
    ],
)
def test_gpus_without_flash_attention(capability, built, dtype, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    choice = choose_attention_kernel("auto", SHAPE, torch.device("cuda", 0), dtype)
    assert choice.kernel == "reference" and reason in choice.describe()


def test_a_kernel_that_cannot_run_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> float:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr("finetune.kernels.choice.flash_difference", fails)
    choice = choose_attention_kernel("auto", SHAPE, CPU, torch.float32)
    assert choice.kernel == "reference" and choice.reason.endswith("no kernel image is available")

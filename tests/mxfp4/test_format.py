"""MXFP4: against transformers for every byte and scale, against hand-written numbers, and as properties."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from finetune.mxfp4.format import dequantise, pack, quantise, unpack

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def every_byte_and_scale() -> tuple[torch.Tensor, torch.Tensor]:
    """blocks [1, 256, 16, 16] with all bytes in each row, scales [1, 256, 16]: one scale byte per row."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    return blocks, scales


def random_packed(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, shape, dtype=torch.uint8, generator=generator)
    return blocks, scales


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    a, b = a.contiguous(), b.contiguous()
    both_nan = a.isnan() & b.isnan()  # a NaN's payload means nothing
    return a.dtype == b.dtype and bool(((a.view(integer) == b.view(integer)) | both_nan).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_under_every_scale_has_the_bits_transformers_gives(dtype: torch.dtype) -> None:
    blocks, scales = every_byte_and_scale()
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert same_bits(dequantise(blocks, scales, dtype), theirs)


def test_the_comparison_with_transformers_sees_swapped_nibbles_and_a_scale_off_by_one() -> None:
    blocks, scales = random_packed(2, 6, 3)
    theirs = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    assert same_bits(dequantise(blocks, scales), theirs)
    assert not same_bits(dequantise((blocks >> 4) | (blocks << 4), scales), theirs)
    assert not same_bits(dequantise(blocks, scales + 1), theirs)


def test_hand_written_bytes() -> None:
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x71  # low nibble 1 -> .5 first, high nibble 7 -> 6 second
    blocks[0, 0, 15] = 0xA4  # 4 -> 2, then 10 -> -1
    values = dequantise(blocks, torch.tensor([[128]], dtype=torch.uint8), torch.float32)
    assert values[0, :2].tolist() == [1.0, 12.0]
    assert values[0, -2:].tolist() == [4.0, -2.0]
    assert unpack(blocks)[0, :2].tolist() == [1, 7]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7), (2, 64, 900)])
def test_any_leading_shape_and_more_than_one_piece(shape: tuple[int, ...]) -> None:
    blocks, scales = random_packed(*shape)
    values = dequantise(blocks, scales, torch.float32)
    lookup = torch.tensor([*GRID, *(-v for v in GRID)])
    expected = lookup[unpack(blocks).long()] * torch.exp2(scales.float() - 127).repeat_interleave(32, dim=-1)
    assert torch.equal(values, expected)


def test_out_is_written_in_place_and_must_fit() -> None:
    blocks, scales = random_packed(2, 4, 3)
    buffer = torch.full((2, 4, 96), math.nan, dtype=torch.bfloat16)
    assert dequantise(blocks, scales, out=buffer) is buffer
    assert torch.equal(buffer, dequantise(blocks, scales))
    for wrong in (buffer.float(), buffer[:1], torch.empty(2, 96, 4, dtype=torch.bfloat16).transpose(1, 2)):
        with pytest.raises(ValueError, match="out must be"):
            dequantise(blocks, scales, out=wrong)


def test_strided_inputs_are_read_in_element_order() -> None:
    blocks, scales = random_packed(4, 6, 3)
    assert torch.equal(dequantise(blocks[:, ::2], scales[:, ::2]), dequantise(blocks, scales)[:, ::2])


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (torch.zeros(2, 3, 15, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8), "blocks must be"),
        (torch.zeros(2, 3, 16, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.uint8), "blocks must be"),
        (torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8), "do not belong"),
        (torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 3), "do not belong"),
    ],
)
def test_mismatched_shapes_are_refused(blocks: torch.Tensor, scales: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantise(blocks, scales)


def test_other_float_types_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        dequantise(*random_packed(1, 1), dtype=torch.float16)


def scratch_bytes(work: Callable[[], object]) -> int:
    """The most bytes that were allocated at once while `work` ran, from torch's own allocation records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def test_scratch_stays_small_and_the_measurement_sees_a_large_one() -> None:
    blocks, scales = random_packed(8, 256, 90)  # 2.9 MB packed, 11.8 MB as bf16
    out = torch.empty(8, 256, 2880, dtype=torch.bfloat16)
    dequantise(blocks, scales, out=out)
    assert scratch_bytes(lambda: dequantise(blocks, scales, out=out)) < 5 * 2**20
    assert scratch_bytes(lambda: convert_moe_packed_tensors(blocks, scales)) > out.nbytes


@given(st.lists(st.integers(0, 15), min_size=32, max_size=32), st.integers(0, 15))
@settings(max_examples=50, deadline=None)
def test_pack_and_unpack_are_inverse(codes: list[int], last: int) -> None:
    tensor = torch.tensor([codes, codes[::-1]], dtype=torch.uint8)
    tensor[1, -1] = last
    blocks = pack(tensor)
    assert blocks.shape == (2, 1, 16)
    assert torch.equal(unpack(blocks), tensor)
    assert blocks[0, 0, 0] == codes[0] + 16 * codes[1]


def test_pack_refuses_codes_that_are_not_nibbles() -> None:
    with pytest.raises(ValueError, match="above 15"):
        pack(torch.full((32,), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="divisible by 32"):
        pack(torch.zeros(33, dtype=torch.uint8))


def block_of(*first: float) -> torch.Tensor:
    return torch.tensor([*first, *([0.0] * (32 - len(first)))])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4)],
        *[(0.26, 0.5), (0.74, 0.5), (2.51, 3), (4.99, 4), (5.01, 6), (6.9, 6), (7.0, 6)],
    ],
)
def test_rounding_is_to_nearest_and_ties_go_to_the_even_code(value: float, expected: float) -> None:
    scale = torch.tensor([127], dtype=torch.uint8)
    for sign in (1, -1):
        blocks, scales = quantise(block_of(sign * value), scale)
        assert dequantise(blocks, scales, torch.float32)[0] == sign * expected


@pytest.mark.parametrize(
    ("largest", "scale"), [(4.0, 127), (6.0, 127), (7.0, 127), (7.01, 128), (8.0, 128), (3.5, 126), (3.51, 127)]
)
def test_the_scale_rule(largest: float, scale: int) -> None:
    assert quantise(block_of(0.1, -largest))[1].tolist() == [scale]


def test_a_given_scale_is_kept_and_saturates() -> None:
    blocks, scales = quantise(block_of(100.0, -100.0, 1e38, 2.0), torch.tensor([126], dtype=torch.uint8))
    assert scales.tolist() == [126]
    assert dequantise(blocks, scales, torch.float32)[:4].tolist() == [3.0, -3.0, 3.0, 2.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_weights_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="infinite or NaN"):
        quantise(block_of(1.0, bad))


def test_zeros_and_the_ends_of_float32() -> None:
    tiny, huge = 2.0**-149, torch.finfo(torch.float32).max
    values = torch.stack([block_of(), block_of(-0.0), block_of(tiny), block_of(2.0**-128), block_of(huge, -huge)])
    blocks, scales = quantise(values)
    back = dequantise(blocks, scales, torch.float32)
    assert scales[:, 0].tolist() == [127, 127, 0, 0, 252]
    assert back[:4, 0].tolist() == [0.0, 0.0, 0.0, 2.0**-128]
    assert not bool(torch.signbit(back[1]).any())
    assert back[4, :2].tolist() == [6 * 2.0**125, -6 * 2.0**125]  # saturates rather than overflow


@given(st.integers(0, 2**31 - 1), st.integers(2, 250))
@settings(max_examples=30, deadline=None)
def test_values_on_a_grid_are_unchanged(seed: int, scale: int) -> None:
    blocks, _ = random_packed(4, 2, seed=seed)
    scales = torch.full((4, 2), scale, dtype=torch.uint8)
    values = dequantise(blocks, scales, torch.float32)
    again_blocks, again_scales = quantise(values)
    assert torch.equal(dequantise(again_blocks, again_scales, torch.float32), values)
    same_scale = again_scales == scales
    equal_but_for_zero_sign = (again_blocks == blocks) | (unpack_zero_sign(again_blocks) == unpack_zero_sign(blocks))
    assert bool(equal_but_for_zero_sign[same_scale].all())


def unpack_zero_sign(blocks: torch.Tensor) -> torch.Tensor:
    """The same blocks with code 8 (-0) written as code 0."""
    codes = unpack(blocks)
    return pack(torch.where(codes == 8, torch.zeros_like(codes), codes))


@given(st.integers(0, 2**31 - 1), st.integers(-40, 40))
@settings(max_examples=30, deadline=None)
def test_no_value_of_the_chosen_grid_is_nearer(seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(6, 64, generator=generator) * 2.0**exponent
    blocks, scales = quantise(weights)
    step = torch.exp2(scales.double() - 127).repeat_interleave(32, dim=-1).unsqueeze(-1)
    grid = torch.tensor([*GRID, *(-v for v in GRID)], dtype=torch.float64) * step
    nearest = (weights.double().unsqueeze(-1) - grid).abs().amin(-1)
    error = (dequantise(blocks, scales, torch.float32).double() - weights.double()).abs()
    assert torch.equal(error, nearest)


def test_the_scale_rule_loses_less_than_floor_and_ceil() -> None:
    weights = torch.randn(2000, 32, generator=torch.Generator().manual_seed(1))
    largest = weights.abs().amax(-1)
    floor = (torch.floor(torch.log2(largest)) - 2 + 127).to(torch.uint8)
    ceil = (torch.ceil(torch.log2(largest / 6)) + 127).to(torch.uint8)

    def error(scales: torch.Tensor | None) -> float:
        packed = quantise(weights, None if scales is None else scales.unsqueeze(-1))
        return float((dequantise(*packed, torch.float32) - weights).norm() / weights.norm())

    assert error(None) < min(error(floor), error(ceil))
    assert 0.10 < error(None) < 0.12

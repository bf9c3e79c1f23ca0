"""Our attention module and norm against transformers' own on the same weights, and against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
    apply_rotary_pos_emb,
)

from finetune.kernels.attention import plan_attention
from finetune.kernels.rotary import rotate
from finetune.model.attention import PackedAttention, RmsNorm, register_attention

CONFIG = GptOssConfig(
    hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=2,
    intermediate_size=32, num_local_experts=4, vocab_size=64, sliding_window=6, rms_norm_eps=1e-5,
)  # fmt: skip


def random(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norms(width: int) -> tuple[RmsNorm, GptOssRMSNorm]:
    ours, theirs = RmsNorm(width, 1e-5), GptOssRMSNorm(width, 1e-5)
    weight = 1 + 0.3 * random(width, seed=1)
    ours.weight.data, theirs.weight.data = weight, weight.clone()
    return ours, theirs


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_norm_is_within_three_ulp_of_float64_and_no_worse_than_eager(scale: float) -> None:
    ours, theirs = norms(2880)
    x = scale * random(7, 2880)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.weight.double()
    ulp = torch.finfo(torch.float32).eps * 2.0 ** exact.abs().log2().floor()
    errors = [((norm(x).double() - exact).abs() / ulp).max() for norm in (ours, theirs)]
    # Five roundings, in the same order as the published module: 2.8 ulp at most, and its are the same.
    assert errors[0] <= 3 and errors[0] <= errors[1]
    without_eps = x.double() / x.double().square().mean(-1, keepdim=True).sqrt() * ours.weight.double()
    assert scale > 1e-3 or ((without_eps - exact).abs() / ulp).max() > 3, "control: the eps is seen"
    torch.testing.assert_close(ours(x), theirs(x), rtol=4e-7, atol=0)


def test_norm_in_bfloat16_is_rounded_once() -> None:
    ours, theirs = (norm.bfloat16() for norm in norms(64))
    x = random(5, 64, dtype=torch.bfloat16)
    differing = (ours(x) != theirs(x)).float().mean()
    assert differing == 0, "transformers multiplies by the weight in float32 too"


def test_norm_has_the_gradient_of_the_published_one() -> None:
    ours, theirs = norms(64)
    grads = []
    for norm in (ours, theirs):
        x = random(5, 64, seed=2).requires_grad_()
        grads.append(torch.autograd.grad(norm(x), x, random(5, 64, seed=3))[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions_have_the_bits_of_transformers(dtype: torch.dtype) -> None:
    q, k = random(1, 4, 9, 16, dtype=dtype), random(1, 2, 9, 16, seed=1, dtype=dtype)
    cos, sin = GptOssRotaryEmbedding(CONFIG)(q, torch.arange(9)[None])
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    for x, wanted in zip((q, k), theirs, strict=True):
        ours = rotate(x[0].transpose(0, 1).contiguous(), cos[0], sin[0])
        assert torch.equal(ours.transpose(0, 1), wanted[0])


def test_rotary_gradient_is_that_of_finite_differences() -> None:
    angles = random(5, 4, dtype=torch.float64)
    x = random(5, 3, 8, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), (x,))


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_equals_transformers_on_one_example(layer: int) -> None:
    """Output and the gradients of input, projections and sinks, in a sliding and a full layer, in float64."""
    config = copy.deepcopy(CONFIG)
    config._attn_implementation = "eager"
    theirs = GptOssAttention(config, layer).double()
    for number, parameter in enumerate(theirs.parameters()):
        parameter.data = random(*parameter.shape, seed=number, dtype=torch.float64) * 0.3
    own = copy.deepcopy(CONFIG)
    own._attn_implementation = register_attention("reference")
    ours = PackedAttention(own, layer).double()
    ours.load_state_dict(theirs.state_dict())
    x, grad_out = random(1, 11, 48, seed=20, dtype=torch.float64), random(1, 11, 48, seed=21, dtype=torch.float64)
    positions = torch.arange(11)[None]
    angles = GptOssRotaryEmbedding(CONFIG)(x, positions)
    window = CONFIG.sliding_window if layer == 0 else None
    plan = plan_attention(torch.zeros_like(positions), positions, window)
    distance = positions[0][:, None] - positions[0][None]
    hidden = (distance < 0) | (distance >= (window or 99))
    mask = torch.zeros(11, 11, dtype=torch.float64).masked_fill_(hidden, -1e30)[None, None]
    results = []
    for module, given in ((ours, plan), (theirs, mask)):
        leaf = x.clone().requires_grad_()
        out, _ = module(hidden_states=leaf, position_embeddings=angles, attention_mask=given)
        results.append([out, *torch.autograd.grad(out, [leaf, *module.parameters()], grad_out)])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_attention_without_a_plan_is_refused() -> None:
    own = copy.deepcopy(CONFIG)
    own._attn_implementation = register_attention("reference")
    x = random(1, 4, 48)
    angles = GptOssRotaryEmbedding(CONFIG)(x, torch.arange(4)[None])
    with pytest.raises(ValueError, match="needs its plan"):
        PackedAttention(own, 0)(hidden_states=x, position_embeddings=angles, attention_mask=None)

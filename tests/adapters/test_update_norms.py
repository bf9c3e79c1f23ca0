"""Norms of updates against the updates themselves."""

from __future__ import annotations

import pytest
import torch

from finetune.adapters.lora import product_norm


@pytest.mark.parametrize("shape", [((3, 5), (7, 3)), ((4, 3, 5), (4, 7, 3))])
def test_the_norm_equals_that_of_the_product(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (torch.randn(size, generator=torch.Generator().manual_seed(len(size))) for size in shape)
    assert product_norm(a, b) == pytest.approx(float((b @ a).norm()), rel=1e-5)
    assert product_norm(a, b) != pytest.approx(float(a.norm() * b.norm()), rel=1e-2)
    assert product_norm(a, torch.zeros_like(b)) == 0

"""The noise limit: two correct computations are within it, one without an update at a single site is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from router_runs import SMALL, new_base, shake
from test_router_adapter import CONFIGS, sample

from finetune.adapters.attach import attach_adapter
from finetune.config.schema import AdapterConfig
from finetune.model.forward import logits
from finetune.model.noise import largest_difference, mean_kl, rounding_noise

IDS = torch.from_numpy(sample(90).ids).long()


@pytest.mark.parametrize("size", [0.3, 0.003])
@pytest.mark.parametrize("config", [SMALL, CONFIGS["full"]], ids=["small", "router whole"])
@torch.no_grad()
def test_a_missing_update_at_any_site_exceeds_the_noise(config: AdapterConfig, size: float, tiny_base: Path) -> None:
    base = new_base(tiny_base)
    adapter = attach_adapter(base, config, seed=0)
    shake(adapter.parameters(), size)
    whole = logits(base.model, IDS)
    limit = rounding_noise(base.model, lambda: logits(base.model, IDS))
    for site in adapter.sites:
        updates = [p for name, p in adapter.parameters().items() if name.startswith(f"{site.module}.")]
        kept = [update.clone() for update in updates]
        for update in updates:
            update.zero_()
        assert largest_difference(logits(base.model, IDS), whole) > 50 * limit, site.module  # 466 was the least
        for update, values in zip(updates, kept, strict=True):
            update.copy_(values)
    assert torch.equal(logits(base.model, IDS), whole)


@torch.no_grad()
def test_noise_grows_with_the_models_amplification_of_rounding(tiny_base: Path) -> None:
    """The same adapter, larger: logits of the same size, and noise that no limit for all models would allow."""
    base = new_base(tiny_base)
    plain = rounding_noise(base.model, lambda: logits(base.model, IDS))
    adapter = attach_adapter(base, CONFIGS["full"], seed=0)
    shake(adapter.parameters(), 0.3)
    assert rounding_noise(base.model, lambda: logits(base.model, IDS)) > 2 * plain
    assert 1e-5 < plain < 1e-2


@torch.no_grad()
def test_unknown_measures_and_models_are_refused(tiny_base: Path) -> None:
    one, other = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.5]])
    assert largest_difference(other, one) == 0.5
    p, q = one.double().softmax(-1), other.double().softmax(-1)
    assert mean_kl(other, one) == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-5)
    base = new_base(tiny_base)
    reference = logits(base.model, IDS)
    noise = rounding_noise(base.model, lambda: logits(base.model, IDS), mean_kl, reference=reference)
    assert 0 < noise < 1e-3
    with pytest.raises(ValueError, match="no layer of this model is known"):
        rounding_noise(base.model.lm_head, lambda: reference)

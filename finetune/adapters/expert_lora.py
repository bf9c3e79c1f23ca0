"""LoRA on one layer's routed experts: on all of them or on some, with one rank or with a rank for each.

Files of others know one rank a layer and factors for every expert, so this module also says what it comes to there, and
takes that back.

Shape legend: E experts, S adapted ones, L rank, N sum of ranks, D hidden, F expert width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.adapters.sites import Site
from finetune.kernels.adapted import Adapted, Ranks
from finetune.kernels.experts import LoraFactors
from finetune.model.experts import PackedExperts


def is_a(name: str) -> bool:
    """Whether a parameter is an A: the only ones that have no gradient on the first step, where every B is zero."""
    return name.endswith("_a")


class ExpertLora(nn.Module):
    """Updates of one layer's experts: gate_up a [S, L, D], b [S, 2F, L]; down a [S, L, F], b [S, D, L].

    S is the number of adapted experts; a factor that they share has 1 instead. Where ranks differ there is a row for
    each rank of each expert, N of them: gate_up a [N, D], b [N, 2F]; down a [N, F], b [N, D].

    Attributes:
        adapted: which experts these are. None: all, with one rank.
    """

    def __init__(self, experts: PackedExperts, site: Site, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale, self.enabled, self.share, self.rank = site.scale, True, site.share, site.rank
        self.num_experts = experts.shapes["down_proj"][0]
        device = experts.get_buffer("down_proj_bias").device
        self.adapted = _adapted(site, device)
        for name, (num_experts, out, inputs) in experts.shapes.items():
            count = num_experts if site.experts is None else len(site.experts)
            new = partial(torch.zeros, device=device, dtype=dtype)
            if site.ranks is None:
                a = new(1 if site.share == "a" else count, site.rank, inputs)
                b = new(1 if site.share == "b" else count, out, site.rank)
            else:
                a, b = new(sum(site.ranks), inputs), new(sum(site.ranks), out)
            self.register_parameter(f"{name.removesuffix('_proj')}_a", nn.Parameter(a))
            self.register_parameter(f"{name.removesuffix('_proj')}_b", nn.Parameter(b))

    @property
    def ranks(self) -> Ranks | None:
        """Ranks of the adapted experts, where they differ."""
        return None if self.adapted is None else self.adapted.ranks

    def gate_up(self) -> LoraFactors | None:
        """The gate_up update, or None while the adapter is off."""
        return self._updates("gate_up") if self.enabled else None

    def down(self) -> LoraFactors | None:
        """The down update, or None while the adapter is off."""
        return self._updates("down") if self.enabled else None

    def _updates(self, name: str) -> LoraFactors:
        scale = self.scale if self.ranks is None else 1.0
        return LoraFactors(self._of_adapted(f"{name}_a"), self._of_adapted(f"{name}_b"), scale)

    def _of_adapted(self, name: str) -> Tensor:
        """A factor as the expert block takes it, a shared one repeated; differentiable."""
        factor = self.get_parameter(name)
        if self.share == "none" or not name.endswith(f"_{self.share}"):
            return factor
        count = self.num_experts if self.adapted is None else len(self.adapted.numbers)
        return factor.expand(count, -1, -1).contiguous()

    @torch.no_grad()
    def of_all_experts(self, name: str) -> Tensor:
        """One factor for each of the layer's E experts with one rank L and one scale, as files have it.

        Zeros for experts that are not adapted. Where ranks differ, zeros beyond an expert's rank, and its B, in
        float32, times what its scale is more than that of L.
        """
        factor = self._of_adapted(name)
        if self.adapted is None:
            return factor
        if self.ranks is not None:
            factor = factor if is_a(name) else factor.float() * (self.ranks.scales[:, None] / self.scale)
            whole = self.ranks.expand(factor, slice(0, len(self.adapted.numbers)))
            whole = F.pad(whole, (0, 0, 0, self.rank - whole.shape[1]))
            factor = whole if is_a(name) else whole.transpose(1, 2)
        return factor.new_zeros(self.num_experts, *factor.shape[1:]).index_copy(0, self.adapted.index, factor)

    @torch.no_grad()
    def from_all_experts(self, name: str, whole: Tensor) -> Tensor:
        """The inverse of `of_all_experts`, of a factor [E, L, in] or [E, out, L].

        Raises:
            ValueError: it has something where this module has nothing: in another expert, beyond an expert's rank, or
                a factor of its own where it is shared.
        """
        if self.adapted is not None and not is_a(name):
            _refuse_others(whole, self.adapted)
        chosen = whole if self.adapted is None else whole[self.adapted.index.to(whole.device)]
        if self.share != "none" and name.endswith(f"_{self.share}"):
            if not torch.equal(chosen, chosen[:1].expand_as(chosen)):
                raise ValueError(f"{name} differs among experts, and the recipe shares it")
            return chosen[:1]
        if self.ranks is None:
            return chosen
        by_row = (chosen if is_a(name) else chosen.transpose(1, 2)).to(self.ranks.scales.device)
        stored = self.ranks.collapse(by_row, slice(0, len(chosen)))
        if is_a(name):
            return stored
        if int(by_row.count_nonzero()) != int(stored.count_nonzero()):
            raise ValueError(f"{name} goes beyond the ranks that the recipe gives its experts")
        return stored.float() / (self.ranks.scales[:, None] / self.scale)


def _refuse_others(b: Tensor, adapted: Adapted) -> None:
    """Raise ValueError if B [E, out, L] has something for an expert that is not adapted."""
    others = b.flatten(1).any(1).index_fill(0, adapted.index.to(b.device), False).nonzero()
    if len(others):
        raise ValueError(f"it updates expert {int(others[0])}, which the recipe does not adapt")


def _adapted(site: Site, device: torch.device) -> Adapted | None:
    if site.experts is None:
        return None
    ranks = None if site.ranks is None else Ranks.of(site.ranks, site.scales, device)
    return Adapted(site.experts, torch.tensor(site.experts, device=device), ranks)

"""Activation checkpoints offloaded to the host: same gradients, in the right order, little on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import Train
from test_training_equivalence import Run, samples

from finetune.data.batches import collate
from finetune.model.offload import CheckpointOffload, _SideStream

HIDDEN = 64


class Watched(CheckpointOffload):
    """Records the copies; `spoil` changes what is fetched, as a negative control."""

    def __init__(self, *, spoil: bool = False) -> None:
        super().__init__(torch.device("cpu"), HIDDEN, torch.float32)
        self.log: list[str] = []
        self.spoil = spoil

    def _pack(self, tensor):
        packed = super()._pack(tensor)
        if packed is not tensor:
            packed.number = sum(entry.startswith("out") for entry in self.log)
            self.log.append(f"out {packed.number}")
        return packed

    def _fetch(self, offloaded):
        if offloaded.back is None:
            self.log.append(f"back {offloaded.number}")
        super()._fetch(offloaded)
        if self.spoil:
            offloaded.back[0].mul_(1.1)

    def _unpack(self, packed):
        if not isinstance(packed, torch.Tensor):
            self.log.append(f"use {packed.number}")
        return super()._unpack(packed)


def step_with(offload: CheckpointOffload | None, tiny_base: Path) -> Run:
    run = Run(tiny_base, checkpointed=True)
    if offload is not None:
        run.step.policy = replace(run.step.policy, offload=offload)
    run([collate([samples(3)])])
    return run


def test_gradients_have_the_same_bits_and_come_from_the_host(tiny_base: Path) -> None:
    plain, moved, spoilt = (step_with(each, tiny_base) for each in (None, Watched(), Watched(spoil=True)))
    assert plain.gradients.keys() == moved.gradients.keys() and plain.gradients
    assert all(torch.equal(plain.gradients[name], moved.gradients[name]) for name in plain.gradients)
    assert any(not torch.equal(plain.gradients[name], spoilt.gradients[name]) for name in plain.gradients)


def test_the_next_checkpoint_is_fetched_ahead(tiny_base: Path) -> None:
    watched = Watched()
    step_with(watched, tiny_base)
    # Both layers' inputs; in float32 the final norm's saved tensors have the same shape and are offloaded too.
    offloaded = sum(entry.startswith("out") for entry in watched.log)
    used = [int(entry.split()[1]) for entry in watched.log if entry.startswith("use")]
    assert used == list(range(offloaded))[::-1] and offloaded >= 2
    assert [entry for entry in watched.log if entry.startswith("back")] == [f"back {n}" for n in used]
    for number in used[1:]:
        assert watched.log.index(f"back {number}") < watched.log.index(f"use {number}")
    assert watched._leaving is None and watched._newest is None


def test_a_checkpoint_is_freed_when_the_next_is_offloaded() -> None:
    offload = CheckpointOffload(torch.device("cpu"), 8, torch.float32)
    with offload:
        kept = []
        for _ in range(4):
            kept.append(offload._pack(torch.randn(1, 5, 8)))
            assert offload._leaving is not None and offload._leaving[0].shape == (1, 5, 8)
            assert [offloaded.back for offloaded in kept] == [None] * len(kept)
    assert offload._leaving is None
    other = torch.randn(5, 8)
    assert offload._pack(other) is other and offload._unpack(other) is other
    assert _SideStream(torch.device("cpu")).copy(other, torch.empty(5, 8)) is None


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["trainer.activation_offload=true"], 2, "trainer.activation_offload is true, but the model is on a CPU"),
        (
            ["trainer.activation_offload=true", "trainer.activation_checkpointing=false"],
            2,
            "trainer.activation_offload has no effect without trainer.activation_checkpointing",
        ),
        (["model.attention_kernel=flex"], 2, "model.attention_kernel"),
    ],
)
def test_offloading_is_refused_where_it_cannot_work(
    train: Train, overrides: list[str], code: int, message: str, capsys: pytest.CaptureFixture
) -> None:
    found, _ = train(*overrides)
    assert found == code and message in capsys.readouterr().err

"""The router's losses against float64 definitions, and ways of splitting a step that must not change it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from router_runs import SMALL, Run, Together, samples
from safetensors.torch import load_file
from tolerances import StepNoise, largest_share, step_with_noise
from torch import Tensor

from finetune.config.schema import RouterAdapterConfig
from finetune.data.batches import collate, padding_batch
from finetune.model.forward import RouterOutput, record_router
from finetune.objectives.router import BALANCE_LOSS, Z_LOSS, balance_sum, balance_weights, choice_counts, z_sum
from finetune.train.step import StepStats

T, E, K, LAYERS = 60, 6, 2, 3


def layers_of(seed: int, *, grad: bool = False) -> list[RouterOutput]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(LAYERS):
        logits = (torch.randn(T, E, generator=g, dtype=torch.float64) * 2).requires_grad_(grad)
        top = logits.topk(K)
        made.append(RouterOutput(logits, top.indices, top.values.softmax(-1)))
    return made


def oracle(
    layers: list[RouterOutput], base: list[RouterOutput] | None, rows: np.ndarray
) -> tuple[float, list[np.ndarray]]:
    """The balance loss over `rows` and its gradient by the logits, from the definition: numpy, float64, no autograd."""
    values, gradients = [], []
    for number, layer in enumerate(layers):
        x = layer.logits.detach().numpy()[rows]
        p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        n = np.array([(layer.expert_ids.numpy()[rows] == e).sum() for e in range(E)])
        weight = E * n / n.sum()
        if base is not None:
            m = np.array([(base[number].expert_ids.numpy()[rows] == e).sum() for e in range(E)])
            weight = (n + 1) / (m + 1)
        values.append((weight * p.mean(0)).sum())
        # d p_e / d x_j = p_e (1[e = j] - p_j)
        gradient = np.zeros((T, E))
        gradient[rows] = p * (weight - (p * weight).sum(1, keepdims=True)) / (len(x) * LAYERS)
        gradients.append(gradient)
    return float(np.mean(values)), gradients


@pytest.mark.parametrize("target", ["uniform", "base"])
@pytest.mark.parametrize("scope", ["microbatch", "step"])
def test_both_scopes_equal_the_definition(scope: str, target: str) -> None:
    """Four ragged micro-batches: `step` is the definition on all at once, `microbatch` their token-weighted mean."""
    layers, base = layers_of(0, grad=True), layers_of(1) if target == "base" else None
    cuts = [slice(0, 7), slice(7, 30), slice(30, 31), slice(31, 52)]  # the last 8 tokens are padding
    rows = [torch.arange(T)[cut] for cut in cuts]
    real = 52
    whole = balance_weights(
        sum(choice_counts(layers, part) for part in rows), base and sum(choice_counts(base, part) for part in rows)
    )
    total: Tensor | float = 0.0
    for part in rows:
        own = balance_weights(choice_counts(layers, part), None if base is None else choice_counts(base, part))
        total = total + balance_sum(layers, part, whole if scope == "step" else own) / real
    gradients = torch.autograd.grad(total, [layer.logits for layer in layers])
    if scope == "step":
        wanted, wanted_gradients = oracle(layers, base, np.arange(real))
    else:
        each = [oracle(layers, base, part.numpy()) for part in rows]
        shares = [len(part) / real for part in rows]
        wanted = sum(share * value for share, (value, _) in zip(shares, each, strict=True))
        wanted_gradients = [
            sum(share * grads[layer] for share, (_, grads) in zip(shares, each, strict=True)) for layer in range(LAYERS)
        ]
    assert total.item() == pytest.approx(wanted, abs=1e-12)
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        assert np.abs(ours.numpy() - theirs).max() < 1e-12 < np.abs(theirs).max()
    assert abs(wanted - oracle(layers, base, np.arange(T))[0]) > 1e-4, "padding would have changed it"


def test_z_loss_equals_the_definition() -> None:
    layers = layers_of(3)
    rows = torch.arange(11)
    wanted = np.mean([np.log(np.exp(layer.logits.numpy()[:11]).sum(1)) ** 2 for layer in layers])
    assert float(z_sum(layers, rows)) / 11 == pytest.approx(wanted, abs=1e-12)


class TestWhatMinimisesIt:
    def test_uniform_use_is_1_and_stationary(self) -> None:
        logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
        ids = torch.arange(24).reshape(12, 2) % 4  # used evenly, whatever the probabilities
        layers, rows = [RouterOutput(logits, ids, logits[:, :2])], torch.arange(12)
        loss = balance_sum(layers, rows, balance_weights(choice_counts(layers, rows))) / 12
        assert loss.item() == pytest.approx(1.0)
        assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-15

    def test_use_as_the_bases_is_1_and_stationary_and_uniform_use_is_not(self) -> None:
        (layer,) = layers_of(0, grad=True)[:1]
        rows = torch.arange(T)
        chosen = choice_counts([layer], rows)
        loss = balance_sum([layer], rows, balance_weights(chosen, chosen)) / T
        assert loss.item() == pytest.approx(1.0)
        assert torch.autograd.grad(loss, layer.logits)[0].abs().max() < 1e-15
        even = torch.full_like(chosen, T * K / E)
        away = balance_sum([layer], rows, balance_weights(even, chosen)) / T
        assert torch.autograd.grad(away, layer.logits)[0].abs().max() > 1e-4

    @pytest.mark.parametrize("uniform", [True, False])
    def test_descent_leads_to_the_target_where_probability_is_use(self, uniform: bool) -> None:
        """With f = P the loss is 1 + chi-squared of P from the target: least, 1, at the target alone."""
        base = torch.tensor([[400.0, 300.0, 200.0, 90.0, 10.0]], dtype=torch.float64)
        wanted = torch.full((1, 5), 0.2, dtype=torch.float64) if uniform else base / base.sum()
        logits = torch.zeros(1, 5, dtype=torch.float64)
        logits[0, 3] = 2.0
        for _ in range(20_000):
            logits.requires_grad_()
            p = logits.softmax(-1)
            weights = balance_weights(p.detach() * 1000, None if uniform else base)
            loss = (weights * p).sum()
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = (logits - 0.5 * gradient).detach()
        assert (logits.softmax(-1) - wanted).abs().max() < 2e-3
        assert loss.item() == pytest.approx(1.0, abs=1e-3)


SCOPES = {"router_balance_coefficient": 5.0, "router_z_loss_coefficient": 0.1}


def assert_same(found: StepStats, gradients: dict[str, Tensor], one: Run, wanted: StepStats, noise: StepNoise) -> None:
    for name in (BALANCE_LOSS, Z_LOSS):
        assert abs(found.terms[name] - wanted.terms[name]) <= noise.terms[name] < 1e-4 * wanted.terms[name]
    assert largest_share(gradients, one.gradients) <= noise.gradients < 1e-3


@pytest.mark.parametrize("target", ["uniform", "base"])
def test_one_micro_batch_equals_many_equals_two_ranks(target: str, tiny_base: Path) -> None:
    data = samples(6)
    settings = {**SCOPES, "router_balance_scope": "step", "router_balance_target": target}
    one = Run(tiny_base, **settings)
    wanted, noise = step_with_noise(one, [collate([[sample] for sample in data])])
    many = Run(tiny_base, **settings)
    figures = many([collate([[sample]]) for sample in data])
    assert_same(figures, many.gradients, one, wanted, noise)
    together = Together(2)
    runs = [Run(tiny_base, accelerator=together.accelerator(rank), **settings) for rank in range(2)]
    shares = [[collate([[sample]]) for sample in data[:4]], [collate([data[4:]]), *(padding_batch() for _ in range(3))]]
    both = together.run(lambda rank: runs[rank](shares[rank]))
    mean = {name: (runs[0].gradients[name] + runs[1].gradients[name]) / 2 for name in one.gradients}
    for figures in both:
        assert_same(figures, mean, one, wanted, noise)
    apart = Run(tiny_base, **{**settings, "router_balance_scope": "microbatch"})
    apart([collate([[sample]]) for sample in data])
    assert largest_share(apart.gradients, one.gradients) > 1e-2, "each micro-step by itself is another loss"


@pytest.mark.parametrize("scope", ["microbatch", "step"])
def test_padding_and_packing_change_nothing(scope: str, tiny_base: Path) -> None:
    data = samples(5)
    settings = {**SCOPES, "router_balance_scope": scope}
    packed, apart, padded, leaking = (Run(tiny_base, **settings) for _ in range(4))
    ragged = [collate([[sample] for sample in data])]  # padding at the rows' ends
    wanted, noise = step_with_noise(apart, ragged)
    figures = packed([collate([data[:3], data[3:]])])
    assert_same(figures, packed.gradients, apart, wanted, noise)
    figures = padded([collate([data[:3], data[3:]]), padding_batch(), padding_batch()])
    assert_same(figures, padded.gradients, apart, wanted, noise)  # micro-steps of padding alone do not count
    joined = collate([data[:3], data[3:]])
    joined.segments.clamp_(max=0)
    leaking([joined])
    assert largest_share(leaking.gradients, apart.gradients) > 1e-2


def test_the_bases_own_use_as_target_starts_at_1_without_a_gradient(tiny_base: Path) -> None:
    data = [collate([samples(3)])]
    runs = {
        target: Run(tiny_base, fresh=True, router_balance_coefficient=100.0, router_balance_target=target)
        for target in ("base", "uniform")
    }
    plain = Run(tiny_base, fresh=True, router_balance_coefficient=0.0)
    figures = {target: run(data) for target, run in runs.items()}
    plain(data)
    assert figures["base"].terms[BALANCE_LOSS] == pytest.approx(1.0, abs=1e-5) != figures["uniform"].terms[BALANCE_LOSS]
    names = [name for name in plain.gradients if name.endswith("b")]
    of = {target: {n: run.gradients[n] for n in names} for target, run in (*runs.items(), ("none", plain))}
    assert largest_share(of["base"], of["none"]) < 1e-3 < 1e-2 < largest_share(of["uniform"], of["none"])


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_its_gradient_reaches_the_reported_parameters(mode: str, tiny_base: Path) -> None:
    """Of the balance loss alone: with a frozen router adapters before some router, and routers where they train."""
    from finetune.objectives.router import describe_router_reach, router_reach

    config = replace(SMALL, router=RouterAdapterConfig(mode=mode, rank=2))
    run = Run(tiny_base, adapter=config)
    batch = collate([samples(3)])
    from finetune.model.forward import hidden_states
    from finetune.objectives.router import balance_loss

    with record_router(run.base.model) as tape:
        hidden_states(run.base.model, batch.input_ids, batch.positions, batch.segments)
    balance_loss(tape.layers, (batch.segments >= 0).reshape(-1)).backward()
    sites, shape = run.adapter.sites, run.base.checkpoint.arch
    reached = {
        site.module
        for site in sites
        for name, p in run.adapter.parameters().items()
        if name.startswith(f"{site.module}.") and p.grad is not None and p.grad.count_nonzero()
    }
    assert reached == {site.module for site in router_reach(list(sites), shape)}
    unreached = {site.module for site in sites} - reached
    assert unreached == {"model.layers.1.mlp.experts"}
    assert mode in describe_router_reach(list(sites), shape, mode)


def test_routing_is_the_same_in_forward_and_recompute(tiny_base: Path) -> None:
    run = Run(tiny_base, checkpointed=True, adapter=replace(SMALL, router=RouterAdapterConfig(mode="lora", rank=2)))
    seen: dict[int, list[Tensor]] = {}
    for number, layer in enumerate(run.base.model.model.layers):
        layer.mlp.router.register_forward_hook(
            lambda _m, _i, out, number=number: seen.setdefault(number, []).append(out[2].detach().clone())
        )
    run([collate([samples(4)])])
    assert [len(calls) for calls in seen.values()] == [2, 2], "each layer ran forward and again in the backward pass"
    assert all(torch.equal(first, again) for first, again in seen.values())
    assert not torch.equal(seen[0][0], seen[1][0])


def test_target_base_needs_the_adapter(tiny_base: Path) -> None:
    from accelerate import Accelerator

    from finetune.config.schema import TrainerConfig
    from finetune.objectives.router import RouterTerms

    run = Run(tiny_base)
    with pytest.raises(ValueError, match="disable it"):
        RouterTerms(TrainerConfig(router_balance_target="base"), run.base, None, Accelerator(cpu=True))


@pytest.mark.slow
def test_two_gloo_ranks_equal_one(tiny_base: Path, tmp_path: Path) -> None:
    """The same as with threads above, through torch.distributed itself."""
    data = samples(5)
    settings = {"router_balance_coefficient": 5.0, "router_balance_scope": "step", "router_balance_target": "base"}
    one = Run(tiny_base, router_z_loss_coefficient=0.1, **settings)
    wanted, noise = step_with_noise(one, [collate([data])])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in (0, 1):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        script = [sys.executable, str(Path(__file__).with_name("gloo_balance_child.py"))]
        arguments = [str(tiny_base), str(tmp_path / "gradients.safetensors")]
        processes.append(subprocess.Popen([*script, *arguments], env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    terms = json.loads((tmp_path / "gradients.json").read_text())
    gradients = load_file(tmp_path / "gradients.safetensors")
    assert_same(replace(wanted, terms=terms), gradients, one, wanted, noise)

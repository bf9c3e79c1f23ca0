"""One rank and two ranks under every topology make the same steps; each comparison has a negative control."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import MICRO_STEPS_IN_ALL, Outcome, open_base, recipe, train
from safetensors.torch import load_file
from tolerances import sum_noise

from finetune.model import tiny
from finetune.model.noise import rounding_noise
from finetune.train.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

WORKER = Path(__file__).with_name("distributed_worker.py")
LARGEST_LIMIT = 5e-4  # the faults below give twenty times as much at the least


@pytest.fixture(scope="session")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers: more than the buffers in which layers are gathered."""
    directory = tmp_path_factory.mktemp("bases") / "deep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SIZES, "num_hidden_layers", 5)
        patch.setitem(tiny.SIZES, "layer_types", ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"])
        tiny.write_tiny_base(directory, seed=0, kind="random")
    return directory


@pytest.fixture(scope="session")
def alone(deep_base: Path) -> Outcome:
    """One rank computes all micro-batches of each step."""
    torch.set_num_threads(1)
    assert MICRO_STEPS_IN_ALL == 4
    return train(deep_base, ["single"], World())


@pytest.fixture(scope="session")
def limit(deep_base: Path) -> float:
    """What rounding explains of losses, norms and the adapter after all steps: they are made with noise as well.

    The losses are sums besides: a float32 sum over a step's trained tokens, of at most four rows of 90.
    """
    base, adapter = open_base(deep_base, recipe("single", 1, "no-checkpointing"), World())
    before = {name: parameter.detach().clone() for name, parameter in adapter.parameters().items()}
    outcomes: list[Outcome] = []

    def compute() -> torch.Tensor:
        with torch.no_grad():
            for name, parameter in adapter.parameters().items():
                parameter.copy_(before[name])
        outcomes.append(train(deep_base, ["single"], World(), fault="no-checkpointing", opened=(base, adapter)))
        return torch.tensor(outcomes[-1].losses)

    rounding_noise(base.model, compute)
    exact, *noisy = outcomes
    found = max(distance(outcome, exact) for outcome in noisy) + sum_noise(max(exact.losses), 4 * 90)
    print(f"limit: {found:.1e}")
    assert found < LARGEST_LIMIT
    return found


def start(arguments: list[str], count: int = 2) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(count):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return started


def run_jobs(base: Path, out: Path, *jobs: str) -> dict[str, Outcome]:
    processes = start([str(WORKER), str(base), str(out), *jobs])
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)[-3000:]
    outcomes = {}
    for job in jobs:
        path = out / job.replace(">", "-").replace(":", "-")
        losses, norms, facts = json.loads(path.with_suffix(".json").read_text())
        outcomes[job] = Outcome(losses, norms, load_file(path.with_suffix(".safetensors")), facts)
    return outcomes


def distance(one: Outcome, other: Outcome) -> float:
    assert one.adapter.keys() == other.adapter.keys() and len(one.losses) == len(other.losses) == 4
    numbers = [abs(a - b) for a, b in zip(one.losses + one.norms, other.losses + other.norms, strict=True)]
    return max(*numbers, *((one.adapter[name] - other.adapter[name]).abs().max().item() for name in one.adapter))


QUICK = ("fsdp2", "fsdp2>ddp", "ddp:oom", "ddp:drops", "ddp:alone")
SLOW = ("ddp", "zero1", "zero2", "zero3", "fsdp2:no-checkpointing", "zero3:no-checkpointing", "zero1>zero3>fsdp2>zero2")


@pytest.fixture(scope="session")
def quick(deep_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_jobs(deep_base, tmp_path_factory.mktemp("quick"), *QUICK)


@pytest.fixture(scope="session")
def slow(deep_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    pytest.importorskip("deepspeed")
    return run_jobs(deep_base, tmp_path_factory.mktemp("slow"), *SLOW)


@pytest.mark.parametrize("job", ["fsdp2", "fsdp2>ddp"])
def test_two_ranks_equal_one(quick: dict[str, Outcome], alone: Outcome, job: str, limit: float) -> None:
    """Includes a last partial step, in which the second rank has only padding."""
    print(f"{job}: {distance(quick[job], alone):.1e}")
    assert distance(quick[job], alone) <= limit
    assert quick[job].facts["identity"] and quick[job].facts["agree"] == "yes"


@pytest.mark.slow
@pytest.mark.parametrize("job", SLOW)
def test_the_other_topologies_equal_one_rank(slow: dict[str, Outcome], alone: Outcome, job: str, limit: float) -> None:
    print(f"{job}: {distance(slow[job], alone):.1e}")
    assert distance(slow[job], alone) <= limit
    assert slow[job].facts["identity"] and slow[job].facts["agree"] == "yes"
    assert job.split(">")[-1].split(":")[0] in str(slow[job].facts["engine"])


def test_a_dropped_gradient_is_detected(quick: dict[str, Outcome], alone: Outcome) -> None:
    assert distance(quick["ddp:drops"], alone) > 20 * LARGEST_LIMIT
    assert quick["ddp:drops"].facts["agree"] == "yes", "both made the same wrong steps: only the comparison shows it"


def test_a_missing_all_reduce_is_detected(quick: dict[str, Outcome], alone: Outcome) -> None:
    assert distance(quick["ddp:alone"], alone) > 20 * LARGEST_LIMIT
    assert quick["ddp:alone"].facts["agree"] == "the adapter of rank 1 is not that of rank 0"


def test_out_of_memory_on_one_rank_halves_micro_batches_on_all(
    quick: dict[str, Outcome], alone: Outcome, limit: float
) -> None:
    assert quick["ddp:oom"].facts["parts"] == 2 and quick["ddp:drops"].facts["parts"] == 1
    print(f"ddp:oom: {distance(quick['ddp:oom'], alone):.1e}")
    assert distance(quick["ddp:oom"], alone) <= limit


def test_each_rank_stores_its_shard_of_the_packed_layers(quick: dict[str, Outcome]) -> None:
    facts = quick["fsdp2"].facts
    assert facts["all"] == 2 * int(str(facts["held"]))


def test_a_flipped_bit_in_one_shard_is_detected_by_all_ranks(quick: dict[str, Outcome]) -> None:
    assert "model.layers.2." in str(quick["fsdp2"].facts["flip"])

"""Runs of several ranks from the command line: started, stopped, resumed by fewer, lost and hung."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small_run import Train, finetune, manifest_of, metrics_of, wait_for_steps

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.validate import resumed_config
from finetune.errors import ConfigError, MachineError
from finetune.train import watchdog
from finetune.train.checkpoint import load_newest
from finetune.train.watchdog import Watchdog
from finetune.train.world import World, explain_lost_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = ("distributed=ddp", "trainer.gradient_accumulation_steps=1")
LONG = ("trainer.epochs=500", "trainer.max_steps=5000", "evaluate.every_steps=null", "evaluate.test_examples=2")
TOLERANCE = 1e-5


def worker(parent: subprocess.Popen[str], rank: int) -> int:
    """The process id of one rank of a launched run."""
    for path in Path("/proc").iterdir():
        try:
            is_child = path.name.isdigit() and f"\nPPid:\t{parent.pid}\n" in (path / "status").read_text()
            if is_child and f"\0RANK={rank}\0" in (path / "environ").read_text():
                return int(path.name)
        except OSError:
            continue
    pytest.fail(f"no process {rank} below {parent.pid}")


def places(tmp_path: Path) -> tuple[str, str, str]:
    return f"output_dir={tmp_path}", "name=run", "save.every_steps=3"


def assert_close(run: Path, other: Path) -> None:
    """Assert the same steps, each once, with losses and adapter equal up to rounding."""
    for one, two in zip(metrics_of(run), metrics_of(other), strict=True):
        assert one.keys() == two.keys()
        assert all(one[key] == pytest.approx(two[key], abs=TOLERANCE) for key in one if key != "kind")
    mine, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, other))
    assert max((mine[name] - theirs[name]).abs().max().item() for name in mine) < TOLERANCE


def test_a_run_of_two_ranks_is_resumed_by_one(workplace: Path, tmp_path: Path, finished: tuple[Path, str]) -> None:
    process = finetune(
        "train", workplace / "small.yaml", f"output_dir={tmp_path}", "name=run", "save.every_steps=3", *TWO
    )
    run = tmp_path / "run"
    wait_for_steps(process, run, 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors and errors.count("everything is saved") == 1
    assert errors.rstrip().endswith(f"resume with `finetune train --resume {run}`")
    assert manifest_of(run)["processes"].startswith("ddp: 2 ranks over gloo")
    assert load_newest(run / "checkpoints")[0] == manifest_of(run)["loop"]["step"] < 8
    assert main(["train", "--resume", str(run), "distributed=single"]) == 0
    assert_close(run, finished[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero1", "zero2", "zero3"])
def test_every_topology_trains_and_another_resumes_it(
    workplace: Path, tmp_path: Path, finished: tuple[Path, str], kind: str
) -> None:
    """Stop on a signal to the second rank alone, then resume with two ddp ranks."""
    run = tmp_path / "run"
    whole = [
        f"output_dir={tmp_path}",
        "save.every_steps=3",
        f"distributed={kind}",
        "trainer.gradient_accumulation_steps=1",
    ]
    process = finetune("train", workplace / "small.yaml", "name=run", *whole)
    wait_for_steps(process, run, 2)
    os.kill(worker(process, 1), signal.SIGUSR1)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert (run / "deepspeed.json").exists() == kind.startswith("zero")
    process = finetune("train", "--resume", run, "distributed=ddp")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_close(run, finished[0])


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=2", "-m"],
    "deepspeed": ["deepspeed.launcher.runner", "--no_local_rank", "--num_gpus=2", "--module"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_external_launchers_start_the_ranks(
    workplace: Path, tmp_path: Path, finished: tuple[Path, str], launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "finetune", "train", str(workplace / "small.yaml")]
    command += [f"output_dir={tmp_path}", "name=run", "save.every_steps=3", *TWO]
    if launcher == "deepspeed":
        command.append("distributed=zero2")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", finished[0])


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_run_and_is_named(workplace: Path, tmp_path: Path, lost: int) -> None:
    process = finetune("train", workplace / "small.yaml", f"output_dir={tmp_path}", "name=run", *TWO, *LONG)
    wait_for_steps(process, tmp_path / "run", 2)
    os.kill(worker(process, lost), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == MachineError.exit_code
    assert f"rank {lost} was killed by SIGKILL" in errors and "Traceback" not in errors
    assert manifest_of(tmp_path / "run")["status"] == "stopped"


@pytest.mark.slow
def test_a_hanging_rank_is_named_and_the_others_log_their_stacks(workplace: Path, tmp_path: Path) -> None:
    arguments = (f"output_dir={tmp_path}", "name=run", "distributed.timeout_s=15", *TWO, *LONG)
    process = finetune("train", workplace / "small.yaml", *arguments)
    wait_for_steps(process, tmp_path / "run", 2)
    os.kill(worker(process, 1), signal.SIGSTOP)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == MachineError.exit_code
    assert "rank 1 is missing: " in errors, errors
    assert "finetune/train/trainer.py" in errors, "the stack of the process that waits"


@pytest.mark.slow
def test_ranks_stop_when_the_launching_command_is_gone(workplace: Path, tmp_path: Path) -> None:
    process = finetune("train", workplace / "small.yaml", f"output_dir={tmp_path}", "name=run", *TWO, *LONG)
    wait_for_steps(process, tmp_path / "run", 2)
    workers = [worker(process, rank) for rank in (0, 1)]
    process.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{number}").exists() for number in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{number}").exists() for number in workers)
    assert load_newest(tmp_path / "run" / "checkpoints")[0] >= 2
    process.communicate()


def test_another_world_size_than_the_recipe_s_is_refused(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["train", str(workplace / "small.yaml"), f"output_dir={tmp_path}", "name=run"]
    assert main(arguments) == MachineError.exit_code
    assert "2 processes run, the recipe says 1" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main([*arguments, "distributed=fsdp2"]) == MachineError.exit_code
    assert "3 processes run, the recipe says 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unusable_port_is_refused(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    code = main(["train", str(workplace / "small.yaml"), f"output_dir={tmp_path}", "name=run", *TWO])
    assert code == MachineError.exit_code
    assert "torchrun --standalone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distributed.num_processes=2"], "distributed.kind=single is one process"),
        (["distributed=zero2", "distributed.num_processes=1"], "is for several processes"),
        (["distributed=zero4"], "distributed has no option zero4"),
        (["distributed=fsdp2", "trainer.halve_micro_batch_on_oom=true"], "cannot repeat it without the others"),
        (["distributed=zero1", "trainer.on_nonfinite=skip"], "cannot drop those of a step"),
    ],
)
def test_settings_that_contradict_the_topology_are_refused(workplace: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(str(workplace / "small.yaml"), overrides)
    assert words in str(caught.value)


@pytest.mark.slow
def test_a_failed_start_leaves_no_run_directory(workplace: Path, tmp_path: Path) -> None:
    arguments = ("train", workplace / "small.yaml", f"output_dir={tmp_path}", "name=run", "model.identity=f00d", *TWO)
    process = finetune(*arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    assert errors.count("model.identity says f00d") == 1, "only the first process prints"
    assert not (tmp_path / "run").exists()


def test_a_step_has_the_same_sequences_with_another_world_size(workplace: Path) -> None:
    config = compose(str(workplace / "small.yaml"), ["trainer.gradient_accumulation_steps=6"]).config
    three = resumed_config(config, ["distributed=ddp", "distributed.num_processes=3"])
    assert (three.trainer.gradient_accumulation_steps, three.distributed.kind, three.distributed.num_processes) == (
        2,
        "ddp",
        3,
    )
    assert resumed_config(three, ["distributed=single"]) == config
    with pytest.raises(ConfigError, match="4 processes cannot share the 6 micro-batches"):
        resumed_config(config, ["distributed=ddp", "distributed.num_processes=4"])
    with pytest.raises(ConfigError, match="num_proceses"):
        resumed_config(config, ["distributed=ddp", "distributed.num_proceses=3"])


def test_deepspeed_s_settings_are_shown_and_follow_the_recipe(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(workplace / "small.yaml")
    assert main(["config", "show", recipe, "distributed=zero3", "trainer.max_grad_norm=0.25"]) == 0
    shown = capsys.readouterr().out
    settings = json.loads("".join(line[2:] for line in shown.splitlines() if line.startswith("#")).partition(":")[2])
    assert settings["zero_optimization"]["stage"] == 3 and settings["gradient_clipping"] == 0.25
    assert settings["gradient_accumulation_steps"] == 2
    assert main(["config", "show", recipe]) == 0
    assert "DeepSpeed" not in capsys.readouterr().out


def test_the_rank_that_is_behind_is_named() -> None:
    store = dist.HashStore()
    watches = [Watchdog(World(rank, 3, "gloo", store), timeout_s=60) for rank in range(3)]
    for watch in watches:
        watch.heartbeat("step 7, micro-step 1 of 2")
    assert "wait at the same place" in str(watches[0].explain())
    for watch in (*watches, *watches[:2]):
        watch.tick()
    assert watches[2].ticks() == [2, 2, 1]
    assert "rank 2 is missing: stopped" in str(watches[0].explain([2]))
    for rank in (0, 2):
        watches[rank].heartbeat("step 7, waiting for the others")
    said = str(watches[0].explain())
    assert "rank 1 is missing" in said and "rank 1: step 7, micro-step 1 of 2" in said


def test_the_watchdog_survives_the_loss_of_the_store(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 hosts the store; without it the other ranks must still exit."""

    class Gone:
        def set(self, *_: object) -> None:
            raise RuntimeError("Broken pipe")

        check = get = set

    codes: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    watch = Watchdog(World(1, 2, "gloo", Gone()), timeout_s=0.1)  # type: ignore[arg-type]
    watch.tick()
    watch._end()
    assert codes == [MachineError.exit_code]
    assert "rank 0, which stores all heartbeats, does not answer: Broken pipe" in capfd.readouterr().err


def test_a_lost_rank_is_distinguished_from_a_bug() -> None:
    two = World(0, 2, "gloo")
    with pytest.raises(MachineError, match="lost contact with another rank"), explain_lost_ranks(two):
        raise RuntimeError("gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9170")
    with pytest.raises(RuntimeError, match="sizes"), explain_lost_ranks(two):
        raise RuntimeError("sizes do not match")


def test_sigusr1_saves_and_stops_as_sigterm_does(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_run import signal_after

    with monkeypatch.context() as patch:
        signal_after(patch, 2, signal.SIGUSR1)
        code, run = train()
    assert code == 143 and load_newest(run / "checkpoints")[0] == 2


@pytest.fixture
def bad_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """From the chosen micro-batch on (0: none), losses are NaN for the given number of micro-batches."""
    from finetune.objectives import sft as module

    chosen = {"from": 0, "count": 1, "seen": 0}
    loss = module.weighted_nll

    def maybe_nan(*args: Any) -> torch.Tensor:
        chosen["seen"] += 1
        bad = chosen["from"] and chosen["from"] <= chosen["seen"] < chosen["from"] + chosen["count"]
        return loss(*args) * (float("nan") if bad else 1.0)

    monkeypatch.setattr(module, "weighted_nll", maybe_nan)
    return chosen


def test_a_step_that_is_not_finite_stops_before_the_update(
    train: Train, bad_step: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second micro-batch of the fourth step: only its examples are named and kept, with the adapter before it."""
    bad_step["from"] = 8
    code, run = train("save.every_steps=3")
    assert code == 6 and len(metrics_of(run)) == 4  # three steps and one validation
    evidence = run / "nonfinite" / "step-00000004"
    facts = json.loads((evidence / "facts.json").read_text())
    rows = load_file(evidence / "process-0.safetensors")
    assert {name.split(".")[0] for name in rows} == {"0", "1"}
    named = capsys.readouterr().err.partition("its examples: ")[2].splitlines()[0]
    assert named == ", ".join(facts["rows"]["0"]) and 0 < len(facts["rows"]["0"]) < rows["1.segments"].max() + 9
    before = load_newest(run / "checkpoints")[1].adapter
    kept = load_file(evidence / "adapter.safetensors")
    assert all(torch.equal(kept[name], before[name]) for name in before)


def test_a_step_that_is_not_finite_can_be_skipped(train: Train, bad_step: dict[str, Any]) -> None:
    bad_step["from"] = 8
    code, run = train("trainer.on_nonfinite=skip", "evaluate.every_steps=null")
    kinds = [(line["kind"], line["step"]) for line in metrics_of(run)]
    assert code == 0 and ("skipped", 4) in kinds and ("step", 5) in kinds
    assert all(tensor.isfinite().all() for tensor in load_newest(run / "checkpoints")[1].adapter.values())


def test_too_many_skipped_steps_end_the_run(
    train: Train, bad_step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.train.trainer.MOST_SKIPPED", 3)
    bad_step |= {"from": 3, "count": 1000}
    code, run = train("trainer.on_nonfinite=skip", "evaluate.every_steps=null", "evaluate.test_examples=1")
    assert code == 6 and [line["kind"] for line in metrics_of(run)].count("skipped") == 2

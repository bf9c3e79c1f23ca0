"""Read-back: stock PEFT loads the adapter from disk in a fresh process, and its logits must be the trained model's.

The child process (`read_back_child.py`) dequantises the base with transformers, loads the adapter with PEFT, and
compares logits with the live model's on real examples: with the adapter, and without it against the plain base.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune import log
from finetune.adapters.lora import Adapter
from finetune.data.harmony.render import Example
from finetune.errors import CheckError, MachineError
from finetune.files import is_write_failure
from finetune.machine import free_memory
from finetune.model.build import Base
from finetune.model.checkpoint import DenseCheckpoint
from finetune.model.forward import hidden_states
from finetune.model.noise import largest_difference, mean_kl, rounding_noise
from finetune.model.write import write_dense, write_native

MAX_TOKENS = 1024  # of an example; transformers' eager attention stores T x T scores
NUM_POSITIONS = 16  # compared in each example: 201,088 logits each
FREE_MEMORY_SHARE = 0.5
_SKIP = "to do without this check, set read_back: never under export in the run's config.yaml and resume"
CHILD = Path(__file__).with_name("read_back_child.py")


@dataclass(frozen=True)
class ReadBack:
    """Differences between the live model and the adapter as stock PEFT loads it.

    Attributes:
        max_difference: largest absolute difference of logits, adapter on.
        mean_kl: mean KL(live || read back) in nats, adapter on.
        base_difference, base_kl: the same with the adapter off, against the plain base.
        effect, effect_kl: of the adapter on the logits; a reader that ignored it would differ by this much.
        samples: number of examples compared.
        limit, base_limit: differences that rounding explains, adapter on and off (`finetune.model.noise`): of the
            largest difference in float32, of the mean KL otherwise.
        conclusive: the adapter's effect is beyond the limit, so that a reader that ignored it would have been refused.
    """

    max_difference: float
    mean_kl: float
    base_difference: float
    base_kl: float
    effect: float
    effect_kl: float
    samples: int
    limit: float
    base_limit: float
    conclusive: bool

    def describe(self) -> str:
        """One line for the log and the report."""
        if not self.conclusive:
            return (
                f"read back by stock PEFT in a fresh process, inconclusive: the adapter moves logits so little (KL "
                f"{self.effect_kl:.1e}) that ignoring it would hardly show (KL {self.mean_kl:.1e} found, rounding "
                f"explains {self.limit:.1e})"
            )
        return (
            f"read back by stock PEFT in a fresh process: logits differ by {self.max_difference:.1e} at most on "
            f"{self.samples} samples, mean KL {self.mean_kl:.1e} (base alone {self.base_difference:.1e}; rounding "
            f"explains {self.limit:.1e}; the adapter itself moves them by {self.effect:.1f})"
        )


def memory_needed_bytes(base: Base) -> int:
    """Memory of the child process.

    Every weight of the dequantised base in the compute dtype, and half as much again while transformers converts.
    """
    tensors = base.checkpoint.arch.expected_tensors()
    parameters = sum(
        math.prod(shape) * (2 if name.endswith("_blocks") else 1)  # a block's byte holds two weights
        for name, (_, shape) in tensors.items()
        if not name.endswith("_scales")
    )
    return int(parameters * base.compute_dtype.itemsize * 1.5)


def fits_in_memory(base: Base) -> bool:
    """Whether a dequantised base fits into half of the free memory."""
    return memory_needed_bytes(base) < free_memory() * FREE_MEMORY_SHARE


def read_back(
    base: Base,
    adapter: Adapter,
    directory: Path,
    examples: Sequence[Example],
    live: Mapping[str, Tensor] | None = None,
) -> ReadBack:
    """Compare the adapter on disk with the live model.

    Args:
        base: with `adapter` attached, as trained.
        adapter: the live one.
        directory: of the written adapter.
        examples: at least one; each is cut to its first MAX_TOKENS tokens.
        live: from `live_logits`, where other ranks had to take part. None: computed here.

    Raises:
        CheckError: keys are missing or unexpected, logits differ, or the child process failed.
        MachineError: there is no room for temporary files, or the child process was killed.
    """
    log.info(f"reading {directory} back with stock PEFT in a fresh process ...")
    if adapter.changes_router_bias:
        log.info("compared without the changes of the routers' biases, which only merged exports include")
    tensors = live_logits(base, adapter, examples) if live is None else dict(live)
    with scratch_directory() as scratch:
        save_file(tensors, scratch / "live.safetensors")
        request = {
            "base": str(_trained_base(base, scratch / "base")),
            "adapter": str(directory),
            "tensors": str(scratch / "live.safetensors"),
            "dtype": str(base.compute_dtype).removeprefix("torch."),
        }
        answer = run_child(CHILD, request, f"stock PEFT could not read {directory} back", _SKIP)
    exact = base.compute_dtype == torch.float32
    limits = tensors["limit.adapted"].item(), tensors["limit.base"].item()
    result = _result(answer, len(examples), limits, exact=exact)
    _judge(result, answer["problems"], directory, exact=exact)
    return result


def _result(answer: Mapping[str, Any], num_samples: int, limits: tuple[float, float], *, exact: bool) -> ReadBack:
    """`limits`: of the adapted model and of the plain base."""
    adapted, disabled, effect = answer["adapted"], answer["disabled"], answer["effect"]
    return ReadBack(
        max_difference=adapted["max_difference"],
        mean_kl=adapted["mean_kl"],
        base_difference=disabled["max_difference"],
        base_kl=disabled["mean_kl"],
        effect=effect["max_difference"],
        effect_kl=effect["mean_kl"],
        samples=num_samples,
        limit=limits[0],
        base_limit=limits[1],
        conclusive=effect["max_difference" if exact else "mean_kl"] > limits[0],
    )


def _trained_base(base: Base, scratch: Path) -> Path:
    """The base with the weights that were trained over, for transformers to load.

    Written anew where they were rounded while reading: experts of a bfloat16 checkpoint, and all that is stored in NF4.
    """
    if not base.storage_changes and not isinstance(base.checkpoint, DenseCheckpoint):
        return base.checkpoint.directory
    scratch.mkdir()
    if base.storage_changes:
        write_dense(base, scratch)
    elif isinstance(base.checkpoint, DenseCheckpoint):
        write_native(base.checkpoint, scratch)
    return scratch


@torch.no_grad()
def live_logits(base: Base, adapter: Adapter, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Logits of the live model, for `read_back` to compare with.

    Where the model is sharded, every rank calls this.

    Args:
        base: with `adapter` attached, as trained.
        adapter: the live one.
        examples: at least one; each is cut to its first MAX_TOKENS tokens.

    Returns:
        `ids.N` and `where.N` (see `sample_positions`), logits `adapted.N` and `base.N`, and the differences that
        rounding explains: scalars `limit.adapted` and `limit.base`.
    """
    tensors = sample_positions(examples)
    with adapter.without_router_bias():  # PEFT's layout has no place for it
        tensors |= sample_logits(base, tensors, "adapted")
        tensors |= sample_limit(base, tensors, "adapted")
    with adapter.disabled():
        tensors |= sample_logits(base, tensors, "base")
        tensors |= sample_limit(base, tensors, "base")
    return tensors


def sample_positions(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Compared positions: `ids.N`, the first MAX_TOKENS tokens of an example, and `where.N`, spread over them."""
    tensors: dict[str, Tensor] = {}
    for number, example in enumerate(examples):
        ids = torch.tensor(example.ids[:MAX_TOKENS], dtype=torch.long)
        where = torch.linspace(0, len(ids) - 1, min(NUM_POSITIONS, len(ids))).long()
        tensors |= {f"ids.{number}": ids, f"where.{number}": where}
    return tensors


@torch.no_grad()
def sample_logits(base: Base, tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The live model's logits at the positions of `sample_positions`: `KIND.N`, float32 [positions, vocabulary]."""
    base.model.eval()
    count = _count(tensors)
    return {f"{kind}.{n}": _logits(base, tensors[f"ids.{n}"], tensors[f"where.{n}"]) for n in range(count)}


@torch.no_grad()
def sample_limit(
    base: Base, tensors: Mapping[str, Tensor], kind: str, *, rounded_weights: bool = False
) -> dict[str, Tensor]:
    """The difference from the logits `KIND.N` of `sample_logits` that rounding explains: scalar `limit.KIND`.

    Of the largest difference in float32. In bfloat16, and for weights that are rounded to bfloat16 (`rounded_weights`),
    of the mean KL: rounding now and then picks another expert there.
    """

    def compute() -> Tensor:
        return torch.cat(list(sample_logits(base, tensors, kind).values()))

    precision = torch.bfloat16 if rounded_weights else base.compute_dtype
    measure = largest_difference if precision == torch.float32 else mean_kl
    reference = torch.cat([tensors[f"{kind}.{n}"] for n in range(_count(tensors))])
    noise = rounding_noise(base.model, compute, measure, reference=reference, precision=precision)
    return {f"limit.{kind}": torch.tensor(noise, dtype=torch.float64)}


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("ids.") for name in tensors)


def _logits(base: Base, ids: Tensor, where: Tensor) -> Tensor:
    positions = torch.arange(len(ids))[None]
    hidden = hidden_states(base.model, ids[None], positions, torch.zeros_like(positions))[0]
    logits: Tensor = base.model.lm_head(hidden[where.to(hidden.device)])
    return logits.float().cpu().contiguous()


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A temporary directory, removed at the end of the block.

    Raises:
        MachineError: it cannot be written, such as where TMPDIR is full.
    """
    try:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    except Exception as error:
        if not is_write_failure(error):
            raise
        raise MachineError(
            f"temporary files cannot be written to {tempfile.gettempdir()}: {error}",
            fix="free space there, or set TMPDIR to another directory",
        ) from error


# The child's standard input is a pipe that nothing is ever written to: it ends when this process does, however it ends.
_ENDS_WITH_ITS_PARENT = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_child(script: Path, request: Mapping[str, Any], failure: str, fix: str | None = None) -> dict[str, Any]:
    """Run a script that imports nothing of this package in a fresh process, which ends when this one is killed.

    Args:
        script: reads the request's path from its command line and prints `RESULT ` and JSON.
        request: its input.
        failure: the first line of the error if it prints no result.
        fix: its last line.

    Raises:
        CheckError: it failed.
        MachineError: it was killed, most likely by running out of memory; or there is no room for temporary files.
    """
    # Nothing may come from a hub: everything the child process needs is on this disk.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
    ending, kept_open = os.pipe()
    try:
        with scratch_directory() as scratch:
            path = scratch / "request.json"
            path.write_text(json.dumps(request))
            # A session of its own: Ctrl-C goes to this process, which waits for the check.
            done = subprocess.run(
                [sys.executable, "-c", _ENDS_WITH_ITS_PARENT, str(script), str(path)],
                stdin=ending,
                capture_output=True,
                text=True,
                env=environment,
                check=False,
                start_new_session=True,
            )
    finally:
        os.close(ending)
        os.close(kept_open)
    if done.returncode < 0:
        raise MachineError(
            f"{failure}: the child process was killed by signal {-done.returncode}",
            why="most likely it ran out of memory",
            fix=fix,
        )
    results = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not results:
        raise CheckError(
            failure,
            why=" / ".join(done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode}",
            fix=fix,
        )
    return dict(json.loads(results[-1]))


def _judge(result: ReadBack, problems: dict[str, float], directory: Path, *, exact: bool) -> None:
    if problems:
        raise CheckError(f"{directory} did not load cleanly with stock PEFT: {problems}")
    found, alone = (result.max_difference, result.base_difference) if exact else (result.mean_kl, result.base_kl)
    if found <= result.limit and alone <= result.base_limit:
        return
    raise CheckError(
        f"{directory} read back by stock PEFT is not the model that was trained: logits differ by "
        f"{result.max_difference:.2g} (KL {result.mean_kl:.2g}), the base alone by {result.base_difference:.2g}; "
        f"rounding explains {'' if exact else 'a KL of '}{result.limit:.2g} and {result.base_limit:.2g}",
        why=f"the adapter itself moves logits by {result.effect:.2g}",
        fix="do not serve it; report this with the versions of torch, transformers and peft",
    )

"""Memory around a run: refuse what will not fit before anything is downloaded, and explain it where it did not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune import log
from finetune.config.distributed_rules import SHARDED_BASE
from finetune.config.schema import RunConfig
from finetune.errors import CapacityError, is_out_of_memory
from finetune.estimate.changes import cheapest_changes
from finetune.estimate.fit import Budget, fit
from finetune.estimate.host import available_host_bytes
from finetune.estimate.report import make_estimate
from finetune.estimate.shapes import BaseFacts, find_base
from finetune.estimate.text import change_lines, memory_lines, verdict


def check_memory(config: RunConfig) -> None:
    """Estimate a run on the device that it will use, and say in a line that it fits.

    Raises:
        CapacityError: it does not, every process holds the whole base, and the recipe does not say to go on all the
            same.
    """
    facts = find_base(config.model.path)
    if facts is None:
        log.info(f"memory: not estimated, since config.json of {config.model.path} is not here yet")
        return
    budget = device_budget(config)
    result = fit(config, facts.shape, budget)
    if result.fits:
        log.info(f"memory, estimated: {verdict(result)}")
    elif config.trainer.ignore_memory_estimate:
        log.warning(f"memory, estimated: {verdict(result)}; going on, as trainer.ignore_memory_estimate says")
    elif config.distributed.kind in SHARDED_BASE:
        log.warning(
            f"memory, estimated: {verdict(result)}; going on, since the estimate for distributed.kind="
            f"{config.distributed.kind} has not been held against a GPU yet"
        )
    else:
        estimate = make_estimate(config, "", facts, budget)
        raise CapacityError(
            f"memory, estimated: {verdict(result)}",
            why=_indented(memory_lines(result.memory)),
            fix=_indented(
                [
                    *change_lines(estimate.changes, estimate.enough),
                    "or try it all the same: trainer.ignore_memory_estimate=true",
                ]
            ),
        )


def device_budget(config: RunConfig) -> Budget:
    """Memory of the device that a recipe would use on this machine. Imports torch."""
    from finetune.train.device import gpu_memory

    gpu = gpu_memory(config.model)
    if gpu is None:
        return Budget.of_host(available_host_bytes())
    return Budget.of_gpu(gpu.name, gpu.total_bytes, gpu.free_bytes)


@contextmanager
def explained_out_of_memory(config: RunConfig | None) -> Iterator[None]:
    """Turn memory that ran out inside the block into the parts of the step and the cheapest changes.

    Args:
        config: of the run. None: not known, and nothing is added.

    Raises:
        CapacityError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        facts = find_base(config.model.path) if config is not None and is_out_of_memory(error) else None
        if config is None or facts is None:
            raise
        raise _explanation(config, facts, error) from error


def config_of_run(run: Path) -> RunConfig | None:
    """The configuration of a run directory, None if there is none to read (resuming then says what is wrong)."""
    from finetune.config.validate import load_run_config

    return load_run_config(run / "config.yaml") if (run / "config.yaml").is_file() else None


def _explanation(config: RunConfig, facts: BaseFacts, error: Exception) -> CapacityError:
    # Whatever the estimate said, it did not fit; so no change is claimed to be enough.
    nothing = Budget(0.0, "", device_budget(config).on_gpu)
    result = fit(config, facts.shape, nothing)
    changes = cheapest_changes(config, facts.shape, nothing)
    first = (str(error).splitlines() or ["no memory left"])[0]
    return CapacityError(
        f"out of memory: {first}",
        why=_indented(["the estimated parts of a step are:", *memory_lines(result.memory)]),
        fix=_indented(change_lines(changes, {})),
    )


def _indented(lines: list[str]) -> str:
    return "\n    ".join("\n".join(lines).splitlines())

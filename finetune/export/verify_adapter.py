"""Is the exported adapter the one it was made from? Asked in a fresh process, before the result gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune import log
from finetune.adapters.read_back import run_child
from finetune.errors import CheckError
from finetune.export.source import AdapterSource
from finetune.export.targets import AdapterTarget

ADAPTER_CHILD = Path(__file__).with_name("adapter_child.py")


def verify_adapter(source: AdapterSource, target: AdapterTarget, directory: Path) -> dict[str, Any]:
    """Read an export back by its target's layout and compare what every site does with the source.

    Args:
        source: the adapter it was made from.
        target: whose layout it has.
        directory: where it lies, with its finetune.json.

    Returns:
        What was found, for export.json: `sites` (layers x projections x experts), `kinds` (sites by projection),
        `zeros` (projections that were added for the server and do nothing) and `max_relative_difference`.

    Raises:
        CheckError: names the tensor that is missing, unexpected, not finite or wrong.
        MachineError: the other process was killed.
    """
    request = {"target": target, "directory": str(directory), "source": str(source.directory)}
    answer = run_child(ADAPTER_CHILD, request, f"the exported adapter could not be read back as {target} has it")
    problems = answer.pop("problems")
    if problems:
        name, problem = next(iter(problems.items()))
        raise CheckError(
            f"{name} is wrong in the exported adapter: {problem}",
            why=f"{len(problems)} problems in all, {answer['sites']} sites were compared with {source.directory}",
            fix="nothing was kept; report this with the adapter's adapter_config.json",
        )
    log.info(
        f"read back as {target} has it in a fresh process: {answer['sites']} sites act as the source's "
        f"(largest relative difference {answer['max_relative_difference']:.1e})"
    )
    return answer

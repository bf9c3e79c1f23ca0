"""After training, on rank 0: save the adapter and verify it by reading it back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from finetune import log
from finetune.adapters.compact import is_smaller, write_compact
from finetune.adapters.lora import Adapter, lora_parameters, update_norms
from finetune.adapters.provenance import BaseRecord
from finetune.adapters.read_back import fits_in_memory, memory_needed_bytes, read_back
from finetune.adapters.store import write_adapter
from finetune.data.harmony.render import Example
from finetune.errors import MachineError
from finetune.train.run_directory import Run
from finetune.train.session import Session


@dataclass(frozen=True)
class Result:
    """The result of a finished training, in memory.

    Attributes:
        adapter: the whole adapter by name, on the CPU.
        live_logits: of the live model, for comparison (`finetune.adapters.read_back.live_logits`); None: no read-back.
        not_read_back: why the adapter will not be read back.
    """

    adapter: dict[str, Tensor]
    live_logits: dict[str, Tensor] | None
    not_read_back: str | None


def why_not_read_back(session: Session) -> str | None:
    """Why the adapter will not be read back; None if it will."""
    export, base = session.config.export, session.base
    if export.read_back == "never":
        return "export.read_back is never"
    if export.read_back == "auto" and not fits_in_memory(base):
        needed = memory_needed_bytes(base) / 2**30
        return f"a dequantised base needs {needed:.0f} GiB of memory, more than half of what is free"
    return None


def read_back_examples(session: Session) -> Sequence[Example]:
    """The examples on which logits are compared."""
    split = session.splits.get("test", session.splits["train"])
    return split.examples[: session.config.export.read_back_examples]


def write_result(session: Session, run: Run, result: Result) -> None:
    """Save the adapter, read it back, and give it its name; the live model does not run any more.

    Until the read-back has passed it is `adapter_unverified`, which no command takes for the run's adapter.

    Raises:
        CheckError: the adapter read back is not the one that was trained.
        MachineError: it could not be read back, and `export.read_back` is `always`.
    """
    unshard(session.adapter, result.adapter)
    for old in (run.unverified_adapter, run.adapter):  # its read-back failed or was killed, and the run was resumed
        shutil.rmtree(old, ignore_errors=True)
    location, config = session.location, session.config.adapter
    name = location.name if location.revision else str(location.directory.resolve())
    base = BaseRecord(name, location.revision, session.base.identity, session.base.storage_changes, session.tokenizer)
    write_adapter(run.unverified_adapter, session.adapter, config, base)
    run.update_manifest(adapter_norms=update_norms(session.adapter))
    try:
        run.update_manifest(read_back=_read_back(session, run, result))
    except BaseException:
        log.warning(f"the adapter was not verified: it stays in {run.unverified_adapter}")
        raise
    run.unverified_adapter.rename(run.adapter)
    log.info(f"adapter: {run.adapter}")
    if is_smaller(session.adapter):
        compact = run.path / "adapter_compact"
        shutil.rmtree(compact, ignore_errors=True)
        num_experts = session.base.checkpoint.arch.num_experts
        write_compact(compact, session.adapter, num_experts, rslora=config.rslora, base=base)
        log.info(f"adapter, compact form: {compact}")


def unshard(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Replace this rank's shards of the parameters by whole parameters."""
    for site, module in zip(adapter.sites, adapter.modules, strict=True):
        for name in lora_parameters(module):
            setattr(module, name, nn.Parameter(tensors[f"{site.module}.{name}"], requires_grad=False))


def _read_back(session: Session, run: Run, result: Result) -> dict[str, Any]:
    """Read the adapter back, or log why not; returns the manifest's entry."""
    if result.live_logits is None:
        log.warning(f"the adapter was not read back with stock PEFT: {result.not_read_back}")
        return {"skipped": result.not_read_back}
    try:
        examples = read_back_examples(session)
        found = read_back(session.base, session.adapter, run.unverified_adapter, examples, result.live_logits)
    except MachineError as error:
        if session.config.export.read_back == "always":
            raise
        log.warning(f"the adapter was not read back with stock PEFT: {error.what}")
        return {"skipped": error.what}
    (log.info if found.conclusive else log.warning)(found.describe())
    return asdict(found)

"""Export the base with the adapter merged in: check both, plan, write, verify, and only then give it its name."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import __version__, log
from finetune.adapters.store import CONFIG, WEIGHTS, AdapterFile, warn_held_as, write_facts
from finetune.errors import CheckError, InputError
from finetune.export.base import native_base
from finetune.export.card import write_card
from finetune.export.end_to_end import measure_survival
from finetune.export.execute import write_shards
from finetune.export.gguf_file import gguf_bytes, gguf_name, write_gguf
from finetune.export.judge import require_kept
from finetune.export.options import CARD, FACTS, ExportOptions, MergedTarget
from finetune.export.plan import MergePlan, describe_plan, plan_merge
from finetune.export.survival import describe_survival, survival_figures
from finetune.export.verify import verify_merged
from finetune.files import sha256_of
from finetune.model.checkpoint import CHECKSUMS_FILE, CONFIG_FILE, INDEX_FILE, Checkpoint
from finetune.model.hub import BaseLocation, locate_base
from finetune.model.identity import checkpoint_identity
from finetune.rounding.merge import Tally
from finetune.rounding.run import RoundedExperts, choose_rounding, round_ahead
from finetune.staging import Staging, refuse_existing

_TERMS = ("LICENSE", "USAGE_POLICY", "NOTICE")
_BASE_CARD = "BASE_README.md"  # the base's own README.md makes room for the model card


def export_merged(
    source: AdapterFile, target: MergedTarget, out: Path, options: ExportOptions, run: Path | None
) -> None:
    """Write a merged checkpoint, or print what would be written.

    Args:
        source: the adapter.
        target: `bf16`, `mxfp4` or `gguf`.
        out: must not exist.
        options: what the command line asked for.
        run: the run directory, for the model card and the prompts of the verification; None: without them.

    Raises:
        ConfigError: `out` exists.
        InputError: the base is not there, is damaged, or is not the adapter's.
        MachineError: the disk is too small or fills up, or a package is missing.
        CheckError: the result does not hold what it should; it keeps its unfinished name.
    """
    refuse_existing(out)
    warn_held_as(source.base_facts, {}, source.directory)
    location = find_base(source, options)
    checkpoint = Checkpoint.open(location.directory)
    layout: MergedTarget = options.gguf_experts if target == "gguf" else target
    rounding = choose_rounding(layout, source, options)
    plan = plan_merge(checkpoint, source, layout, rounding)
    if options.dry_run:
        for line in _dry_run(plan, target, options):
            log.result(line)
        return
    identity = check_base(checkpoint, source)
    with native_base(checkpoint, out) as native:
        _write(plan_merge(native, source, layout, rounding), target, out, options, run, location, identity)


def _write(
    plan: MergePlan,
    target: MergedTarget,
    out: Path,
    options: ExportOptions,
    run: Path | None,
    location: BaseLocation,
    identity: str,
) -> None:
    key = _key(plan, target, identity)
    staging = Staging(out, key)
    staging.require_space(_bytes_needed(plan, target))
    try:
        rounded = round_ahead(plan, out, options, run, identity, key)
    except BaseException:
        staging.discard_if_empty()
        raise
    tallies = write_gguf(plan, staging, rounded) if target == "gguf" else write_shards(plan, staging, rounded)
    facts = _facts(plan, target, location, identity, tallies, rounded)
    if target == "gguf":  # configuration and tokenizer are inside; the terms are not
        _copy([path for path in _companions(plan.checkpoint) if path.name in _TERMS], staging)
    else:
        _write_companions(plan, staging)
    if any(operation.kind == "round experts" for operation in plan.operations):
        facts["survival"]["end_to_end"] = measure_survival(plan, rounded, options, run)
    _verify(plan, target, staging, facts, options, run, tallies)
    _judge(plan, target, staging, facts, run)
    write_card(staging.path / CARD, facts, run)
    _seal(target, staging, facts)
    if rounded is not None:
        rounded.discard()


def find_base(source: AdapterFile, options: ExportOptions) -> BaseLocation:
    """The base's directory: the one asked for, or the one the adapter names.

    Raises:
        InputError: the adapter names none, or it cannot be had.
    """
    if options.base is not None:
        return locate_base(options.base, options.revision)
    if not source.base_name:
        raise InputError(f"{source.directory} does not name its base", fix="give it with --base")
    revision = None if Path(source.base_name).exists() else options.revision or source.base_revision
    return locate_base(source.base_name, revision)


def check_base(checkpoint: Checkpoint, source: AdapterFile) -> str:
    """Hash the base and compare it with the one the adapter was trained on.

    Returns:
        The base's identity.

    Raises:
        InputError: it is another base, or it was changed since.
    """
    with log.Progress("checking base", None, "MiB") as progress:
        identity = checkpoint_identity(checkpoint, progress)
    if source.base_identity is None:
        log.warning(f"base {identity[:12]}: the adapter does not say which base it was trained on")
    elif source.base_identity != identity:
        raise InputError(
            f"{source.directory} was trained on another base",
            why=f"it belongs to {source.base_name} ({source.base_identity[:12]}), {checkpoint.directory} is "
            f"{identity[:12]}; a damaged or changed file has another identity too",
            fix="give the base it was trained on with --base",
        )
    return identity


def _dry_run(plan: MergePlan, target: MergedTarget, options: ExportOptions) -> list[str]:
    lines = describe_plan(plan)
    if target == "gguf":
        lines.append(f"written as one GGUF file with {options.gguf_experts} experts, names and layout of llama.cpp")
    else:
        others = [path for path in _companions(plan.checkpoint) if path.name != CONFIG_FILE]
        lines += [f"copied: {path.name}  {path.stat().st_size:,} bytes" for path in others]
    return lines


def _companions(checkpoint: Checkpoint) -> list[Path]:
    """The base's files that are not weights."""
    shards = {entry.file for entry in checkpoint.entries.values()}
    skipped = shards | {INDEX_FILE, CHECKSUMS_FILE}
    return sorted(path for path in checkpoint.directory.iterdir() if path.is_file() and path.name not in skipped)


def _write_companions(plan: MergePlan, staging: Staging) -> None:
    """Copy what is not weights, byte for byte; write the index; drop quantization_config where nothing is packed."""
    _copy(_companions(plan.checkpoint), staging)
    if plan.target == "bf16":
        config = {key: value for key, value in plan.checkpoint.config.items() if key != "quantization_config"}
        (staging.path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    own_index = plan.checkpoint.directory / INDEX_FILE
    if all(shard.like for shard in plan.shards):
        if own_index.exists():
            shutil.copyfile(own_index, staging.path / INDEX_FILE)
        return
    (staging.path / INDEX_FILE).write_text(plan.index(), encoding="utf-8")


def _copy(files: Sequence[Path], staging: Staging) -> None:
    for path in files:
        shutil.copyfile(path, staging.path / (_BASE_CARD if path.name == CARD else path.name))


def _bytes_needed(plan: MergePlan, target: MergedTarget) -> int:
    rounded = sum(op.num_bytes for op in plan.operations if op.kind in ("round experts", "scales", "expert bias"))
    ahead = rounded if plan.rounding == "compensated" else 0  # kept beside the export until it is done
    if target == "gguf":
        return gguf_bytes(plan) + ahead
    return plan.num_bytes + ahead + sum(path.stat().st_size for path in _companions(plan.checkpoint))


def _key(plan: MergePlan, target: MergedTarget, identity: str) -> str:
    """What an export is made from; a shard of another key is of no use."""
    adapter = [sha256_of(plan.source.directory / name) for name in (WEIGHTS, CONFIG)]
    parts = [__version__, target, plan.rounding, identity, *adapter, *describe_plan(plan)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _facts(
    plan: MergePlan,
    target: MergedTarget,
    location: BaseLocation,
    identity: str,
    tallies: Mapping[str, Tally],
    rounded: RoundedExperts | None,
) -> dict[str, Any]:
    """What export.json says before the verification; prints what became of the experts' updates."""
    facts: dict[str, Any] = {
        "written_by": f"gpt-oss-finetune {__version__}",
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "target": target,
        "experts": plan.target,
        "base": {"name": location.name, "revision": location.revision, "identity": identity},
        "adapter": {
            "directory": str(plan.source.directory.resolve()),
            "sha256": sha256_of(plan.source.directory / WEIGHTS),
            "sites": len(plan.source.sites),
        },
        "updates": {name: tally.wanted**0.5 for name, tally in tallies.items()},
    }
    if target == "gguf":
        facts["file"] = gguf_name(plan)
    if plan.target == "mxfp4":
        facts["survival"] = survival_figures(plan, tallies, rounded.experts if rounded else None)
        for line in describe_survival(facts["survival"]):
            log.result(line)
    return facts


def _verify(
    plan: MergePlan,
    target: MergedTarget,
    staging: Staging,
    facts: dict[str, Any],
    options: ExportOptions,
    run: Path | None,
    tallies: Mapping[str, Tally],
) -> None:
    """Verify, and put the outcome into `facts`; a failure is written beside the files before it is raised."""
    if not options.verify:
        log.warning("the result was not verified (--no-verify)")
        facts["verification"] = {"skipped": "--no-verify"}
        return
    try:
        facts["verification"] = verify_merged(plan, target, staging.path, run, tallies)
    except CheckError as error:
        error.fix = f"do not serve it; it stays in {staging.path} for inspection and {FACTS} says what failed"
        facts["verification"] = {"failed": error.what}
        write_facts(staging.path / FACTS, facts)
        raise


def _judge(plan: MergePlan, target: MergedTarget, staging: Staging, facts: dict[str, Any], run: Path | None) -> None:
    """Put the survival beside the run, for its report, and stop if the fine-tune was lost."""
    end_to_end = facts.get("survival", {}).get("end_to_end", {})
    if run is not None and "survival" in facts:
        write_facts(run / f"survival-{target}.json", {"written": facts["written"], **facts["survival"]})
    if "verdict" not in end_to_end:
        return
    try:
        require_kept(end_to_end, plan.rounding, end_to_end["verdict"])
    except CheckError as error:
        error.fix = f"{error.fix}. It stays in {staging.path}; export.min_gain_kept and the like set what is allowed"
        write_facts(staging.path / FACTS, facts)
        raise


def _seal(target: MergedTarget, staging: Staging, facts: dict[str, Any]) -> None:
    """Write the checksums and export.json, and give the directory its name."""
    files = {path.name: _digest(path, staging) for path in sorted(staging.path.iterdir()) if _is_ours(path)}
    if target != "gguf":
        write_facts(staging.path / CHECKSUMS_FILE, {"algorithm": "sha256", "files": files})
    write_facts(staging.path / FACTS, facts | {"files": files})
    staging.publish()


def _is_ours(path: Path) -> bool:
    return path.is_file() and path.name not in ("progress.json", FACTS, CHECKSUMS_FILE)


def _digest(path: Path, staging: Staging) -> str:
    known = staging.shards.get(path.name)
    return str(known["sha256"]) if known else sha256_of(path)

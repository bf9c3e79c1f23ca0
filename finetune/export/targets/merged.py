"""Export the base with the adapter merged in: check both, plan, write, verify, and only then give it its name."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune import __version__, log
from finetune.adapters.config_file import CONFIG
from finetune.adapters.provenance import warn_other_storage
from finetune.adapters.store import WEIGHTS, AdapterFile, BaseRecord
from finetune.data.harmony.chat_template import TEMPLATE_FILE
from finetune.data.harmony.tokenizer import check_tokenizer
from finetune.errors import CheckError
from finetune.export.base import check_base, find_base, native_base
from finetune.export.card import write_card
from finetune.export.companions import TERMS, companions, copy_companions, export_template, left_out, tell_left_out
from finetune.export.execute import write_shards
from finetune.export.options import CARD, RECORD, ExportOptions, MergedTarget
from finetune.export.plan import MergePlan, choose_rounding, describe_plan, plan_merge
from finetune.export.record import ExportRecord, Failed, Skipped, as_json
from finetune.export.survival.effect import Effect, measure_survival, require_kept
from finetune.export.survival.weights import describe_survival, weight_survival
from finetune.export.targets.gguf import gguf_bytes, gguf_name, write_gguf
from finetune.export.verify import verify_merged
from finetune.files import only_writer, refuse_existing, sha256_of, write_json
from finetune.model.checkpoint import CHECKSUMS_FILE, CONFIG_FILE, INDEX_FILE, Checkpoint
from finetune.model.hub import BaseLocation
from finetune.resumable import ResumableDirectory
from finetune.rounding.merge import Tally
from finetune.rounding.results import RoundedExperts
from finetune.rounding.run import round_experts_ahead


def export_merged(
    adapter: AdapterFile, target: MergedTarget, out: Path, options: ExportOptions, run: Path | None
) -> None:
    """Write a merged checkpoint, or print what would be written.

    Args:
        adapter: opened.
        target: `bf16`, `mxfp4` or `gguf`.
        out: must not exist.
        options: of the command line.
        run: the run directory, for the model card and the prompts of the verification; None: without them.

    Raises:
        ConfigError: `out` exists, or another process writes it.
        InputError: the base is not there, is damaged, or is not the adapter's.
        MachineError: the disk is too small or fills up, or a package is missing.
        CheckError: the result is not base + adapter, or lost the fine-tune; it keeps its unfinished name.
    """
    if options.dry_run:
        _merge(adapter, target, out, options, run)
        return
    with only_writer(out):
        _merge(adapter, target, out, options, run)


def _merge(adapter: AdapterFile, target: MergedTarget, out: Path, options: ExportOptions, run: Path | None) -> None:
    refuse_existing(out)
    warn_other_storage(adapter.base, {}, adapter.directory)
    location = find_base(adapter, options)
    checkpoint = Checkpoint.open(location.directory)
    layout: MergedTarget = options.gguf_experts if target == "gguf" else target
    rounding = choose_rounding(layout, adapter, options)
    plan = plan_merge(checkpoint, adapter, layout, rounding)
    if options.dry_run:
        for line in _dry_run(plan, target, options):
            log.result(line)
        return
    identity = check_base(checkpoint, adapter)
    check_tokenizer(checkpoint.directory, refuse=adapter.base.tokenizer is not None)  # it is copied
    with native_base(checkpoint, out) as native:
        plan = plan_merge(native, adapter, layout, rounding)
        tell_left_out(checkpoint)
        template = export_template(checkpoint.directory, run)
        _Merge(plan, target, out, options, run, location, identity, template).write()


@dataclass(frozen=True)
class _Merge:
    """One merge: its plan, its destination, and the options and files it comes from."""

    plan: MergePlan
    target: MergedTarget
    out: Path
    options: ExportOptions
    run: Path | None
    location: BaseLocation
    identity: str
    template: str

    def write(self) -> None:
        """Write, verify, judge, and give the directory its name."""
        plan, key = self.plan, self._key()
        staging = ResumableDirectory(self.out, key)
        staging.require_space(self._bytes_needed())
        try:
            rounded = self._round_ahead(key) if plan.rounding == "compensated" else None
        except BaseException:
            staging.discard_if_empty()
            raise
        if self.target == "gguf":
            tallies = write_gguf(plan, staging, rounded, template=self.template)
        else:
            tallies = write_shards(plan, staging, rounded)
        record = self._record(tallies, rounded)
        if self.target == "gguf":  # configuration and tokenizer are inside; the terms are not
            copy_companions([path for path in companions(plan.checkpoint) if path.name in TERMS], staging.path)
        else:
            _write_companions(plan, staging, self.template)
        if record.survival is not None and any(op.kind == "round experts" for op in plan.operations):
            record.survival.end_to_end = measure_survival(plan, rounded, self.options, self.run)
        self._verify(staging, record, tallies)
        self._judge(staging, record)
        write_card(staging.path / CARD, record, self.run)
        self._seal(staging, record)
        if rounded is not None:
            rounded.discard()

    def _round_ahead(self, key: str) -> RoundedExperts:
        return round_experts_ahead(
            self.plan.checkpoint,
            self.plan.adapter,
            self.out,
            calibrate_on=self.options.calibration,
            run=self.run,
            identity=self.identity,
            key=key,
        )

    def _key(self) -> str:
        """Hash of what an export is made from; a shard of another key is of no use."""
        adapter = [sha256_of(self.plan.adapter.directory / name) for name in (WEIGHTS, CONFIG)]
        parts = [__version__, self.target, self.plan.rounding, self.identity, self.template, *adapter]
        parts += describe_plan(self.plan)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _bytes_needed(self) -> int:
        plan = self.plan
        kinds = ("round experts", "scales", "expert bias")
        rounded = sum(operation.num_bytes for operation in plan.operations if operation.kind in kinds)
        ahead = rounded if plan.rounding == "compensated" else 0  # kept beside the export until it is done
        if self.target == "gguf":
            return gguf_bytes(plan) + ahead
        return plan.num_bytes + ahead + sum(path.stat().st_size for path in companions(plan.checkpoint))

    def _record(self, tallies: dict[str, Tally], rounded: RoundedExperts | None) -> ExportRecord:
        """The record before the verification; prints how much of the experts' updates survives."""
        base = BaseRecord(self.location.name, self.location.revision, self.identity)
        record = ExportRecord.of(self.target, base, self.plan.adapter)
        record.experts = self.plan.target
        record.updates = {name: tally.wanted**0.5 for name, tally in tallies.items()}
        if self.target == "gguf":
            record.file = gguf_name(self.plan)
        if self.plan.target == "mxfp4":
            record.survival = weight_survival(self.plan, tallies, rounded.experts if rounded else None)
            for line in describe_survival(record.survival):
                log.result(line)
        return record

    def _verify(self, staging: ResumableDirectory, record: ExportRecord, tallies: dict[str, Tally]) -> None:
        """Verify; a failure is recorded beside the files before it is raised."""
        if not self.options.verify:
            log.warning("the result was not verified (--no-verify)")
            record.verification = Skipped("--no-verify")
            return
        try:
            record.verification = verify_merged(self.plan, self.target, staging.path, self.run, tallies, self.template)
        except CheckError as error:
            error.fix = f"do not serve it; it stays in {staging.path} for inspection and {RECORD} says what failed"
            record.verification = Failed(error.what)
            write_json(staging.path / RECORD, as_json(record))
            raise

    def _judge(self, staging: ResumableDirectory, record: ExportRecord) -> None:
        """Write the survival beside the run, for its report, and stop if the fine-tune was lost."""
        survival = record.survival
        if survival is None:
            return
        if self.run is not None:
            path = self.run / f"survival-{self.target}.json"
            write_json(path, {"written": record.written, **as_json(survival)})
        if not isinstance(survival.end_to_end, Effect):
            return
        try:
            require_kept(survival.end_to_end, self.plan.rounding)
        except CheckError as error:
            error.fix = (
                f"{error.fix}. It stays in {staging.path}; export.min_gain_kept and the like set what is allowed"
            )
            write_json(staging.path / RECORD, as_json(record))
            raise

    def _seal(self, staging: ResumableDirectory, record: ExportRecord) -> None:
        """Write the checksums and export.json, and give the directory its name."""
        ours = ("progress.json", RECORD, CHECKSUMS_FILE)
        paths = [path for path in sorted(staging.path.iterdir()) if path.is_file() and path.name not in ours]
        known = staging.files
        files = {p.name: str(known[p.name]["sha256"]) if p.name in known else sha256_of(p) for p in paths}
        if self.target != "gguf":
            write_json(staging.path / CHECKSUMS_FILE, {"algorithm": "sha256", "files": files})
        write_json(staging.path / RECORD, as_json(record) | {"files": files})
        staging.publish()


def _dry_run(plan: MergePlan, target: MergedTarget, options: ExportOptions) -> list[str]:
    lines = describe_plan(plan)
    if target == "gguf":
        lines.append(f"written as one GGUF file with {options.gguf_experts} experts, names and layout of llama.cpp")
    else:
        others = [path for path in companions(plan.checkpoint) if path.name != CONFIG_FILE]
        lines += [f"copied: {path.name}  {path.stat().st_size:,} bytes" for path in others]
        lines += [f"not copied: {name}" for name in left_out(plan.checkpoint)]
    return lines


def _write_companions(plan: MergePlan, staging: ResumableDirectory, template: str) -> None:
    """Copy what is not weights, byte for byte; write the index; drop quantization_config where nothing is packed."""
    copy_companions(companions(plan.checkpoint), staging.path)
    (staging.path / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    if plan.target == "bf16":
        config = {key: value for key, value in plan.checkpoint.config.items() if key != "quantization_config"}
        (staging.path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    own_index = plan.checkpoint.directory / INDEX_FILE
    if all(shard.like for shard in plan.shards):
        if own_index.exists():
            shutil.copyfile(own_index, staging.path / INDEX_FILE)
        return
    (staging.path / INDEX_FILE).write_text(plan.index(), encoding="utf-8")

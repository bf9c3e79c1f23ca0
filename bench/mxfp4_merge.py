"""Share of a fine-tune that a merge back to MXFP4 keeps, on a tiny gpt-oss with real data: `--help` has the stages.

Adapters of three sizes (expert updates near 1, 4 and 10 % of the weights) and three seeds are trained with the command
a user types, on the shipped contract clauses, experts alone: attention merges exactly and would flatter every method.
Each is rounded on its own training records; settings are compared on validation and reported on test examples.
Controls: the update with its output rows shuffled (noise of the same size), with its sign flipped, and attention
trained instead of the experts, which exports without loss. Every result is stored in WORK/results.json, so an
interruption costs one.

    python bench/mxfp4_merge.py --base DIR --work DIR               all stages; prints the table
    python bench/mxfp4_merge.py --base DIR --work DIR --stage train  only one: train, round, controls, settings, table
    python bench/mxfp4_merge.py --synthetic                          layers with several spectra, no model
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mxfp4_synthetic import print_synthetic
from mxfp4_table import say_and_save
from safetensors.torch import load_file, save_file

from finetune.adapters.provenance import PROVENANCE
from finetune.adapters.store import WEIGHTS, AdapterFile
from finetune.cli.main import main as finetune
from finetune.config.compose import compose
from finetune.export.plan import MergePlan, plan_merge
from finetune.export.record import as_json
from finetune.export.survival.effect import HeldOutExamples, held_out_examples, measure_variants
from finetune.export.survival.variants import Variants
from finetune.export.survival.weights import weight_survival
from finetune.model.build import build_base
from finetune.model.checkpoint import Checkpoint
from finetune.rounding.calibration import choose_calibration
from finetune.rounding.compensate import Settings
from finetune.rounding.results import RoundedExperts
from finetune.rounding.run import round_layers

RATES = {"1 %": 2.7e-4, "4 %": 9.5e-4, "10 %": 2.7e-3}  # learning rates that give updates of about these sizes
SEEDS = (0, 1, 2)
ACCURACY_ROWS = 60
CPU = torch.device("cpu")
SETTINGS = {
    "compensated": Settings(),
    "without unit projection": Settings(solves=1),
}
RECIPE = """# @package _global_
defaults:
  - override /model: tiny
  - override /data: legal_cuad
  - override /adapter: {kind}_only
model: {{path: {base}}}
data: {{max_length: 1024}}
adapter: {{{kind}: {{rank: 8, alpha: 16}}}}
trainer: {{epochs: 1, max_steps: {steps}, gradient_accumulation_steps: 1, activation_checkpointing: false}}
evaluate: {{validation_examples: 2, test_examples: 2, labels: never}}
export:
  read_back: never
  old_domain:
    medical: {{path: shipped://medical/pubmedqa_labeled.jsonl.gz, limit: 60}}
"""


class Work:
    """Runs, rounded experts and results of this benchmark, kept between calls."""

    def __init__(self, directory: Path, base: Path, steps: int, rows: int, rates: Mapping[str, float] = RATES) -> None:
        self.directory, self.base, self.steps, self.rows, self.rates = directory, base, steps, rows, rates
        directory.mkdir(parents=True, exist_ok=True)
        self.file = directory / "results.json"
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.checkpoint = Checkpoint.open(base)

    def keep(self, key: str, result: Any) -> None:
        self.results[key] = result
        half = self.file.with_suffix(".half")
        half.write_text(json.dumps(self.results, indent=1))
        half.replace(self.file)

    def recipe(self, kind: str) -> Path:
        path = self.directory / f"{kind}.yaml"
        path.write_text(RECIPE.format(base=self.base, steps=self.steps, kind=kind))
        return path

    def adapter(self, kind: str, size: str, seed: int) -> Path:
        """Train an adapter, or find it."""
        name = f"{kind}-{size.replace(' %', '')}-{seed}"
        run = self.directory / name
        if not (run / "adapter").is_dir():
            shutil.rmtree(run, ignore_errors=True)
            arguments = [f"output_dir={self.directory}", f"name={name}", f"seed={seed}"]
            code = finetune(["train", str(self.recipe(kind)), *arguments, f"trainer.learning_rate={self.rates[size]}"])
            if code:
                raise SystemExit(code)
        return run / "adapter"

    def round(self, source: AdapterFile, name: str, settings: Settings, seed: int) -> tuple[MergePlan, Any]:
        """Round an adapter's experts, calibrated on training records."""
        plan = plan_merge(self.checkpoint, source, "mxfp4", "compensated")
        config = replace(compose(str(self.recipe("experts"))).config, seed=seed)
        calibration, _ = choose_calibration(config, self.checkpoint, None)
        rounded = RoundedExperts.beside(self.directory / name, f"{name} {settings} {calibration.fingerprint}")
        round_layers(self.checkpoint, source, calibration, rounded, CPU, torch.float32, settings)
        return plan, rounded

    def held_out(self, split: str) -> HeldOutExamples:
        config = compose(str(self.recipe("experts"))).config
        if split == "validation":
            old_domain = replace(config.export, old_domain={})
            config = replace(config, data=replace(config.data, test={}), export=old_domain)
        found = held_out_examples(replace(config, evaluate=replace(config.evaluate, labels="auto")), self.rows)
        assert found is not None and found.split == split
        return found

    def measure(
        self,
        plan: MergePlan,
        rounded: RoundedExperts | None,
        split: str,
        names: list[str] | None,
        *,
        labels: bool = False,
    ) -> dict[str, Any]:
        """Measure variants on held-out examples; slow label accuracy on ACCURACY_ROWS of them, without old domain."""
        rows = self.held_out(split)
        if labels:
            few = slice(ACCURACY_ROWS)
            rows = replace(rows, records=rows.records[few], examples=rows.examples[few], old_domain=())
        else:
            rows = replace(rows, labels=None)
        base = build_base(self.checkpoint, CPU, torch.float32, experts_per_chunk=8)
        return as_json(measure_variants(Variants(base, plan, rounded), rows, names))


def stage_train(work: Work) -> None:
    for seed in SEEDS:
        for size in RATES:
            work.adapter("experts", size, seed)
    for size in RATES:
        work.adapter("attention", size, 0)


def stage_round(work: Work) -> None:
    for seed in SEEDS:
        for size in RATES:
            key = f"{size} seed {seed}"
            if key in work.results:
                continue
            started = time.process_time()
            plan, rounded = _rounded(work, size, seed, "compensated")
            found = work.measure(plan, rounded, "test", None)
            found["weights"] = as_json(weight_survival(plan, rounded.tallies, rounded.experts).overall)
            work.keep(key, found | {"cpu_seconds": time.process_time() - started})
            print(f"{key}: {time.process_time() - started:.0f} CPU seconds", flush=True)


def stage_settings(work: Work) -> None:
    """Seed 0: settings compared on validation examples, and label accuracy on some test examples."""
    for size in RATES:
        for setting in SETTINGS:
            key = f"{size} on validation, {setting}"
            if key not in work.results:
                plan, rounded = _rounded(work, size, 0, setting)
                work.keep(key, work.measure(plan, rounded, "validation", ["compensated"]))
        key = f"{size} accuracy"
        if key not in work.results:
            plan, rounded = _rounded(work, size, 0, "compensated")
            names = ["bf16", "nearest", "compensated"]
            work.keep(key, work.measure(plan, rounded, "test", names, labels=True))


def _rounded(work: Work, size: str, seed: int, setting: str) -> tuple[MergePlan, RoundedExperts]:
    name = f"rounded-{size}-{seed}-{setting}".replace(" ", "")
    return work.round(AdapterFile.open(work.adapter("experts", size, seed)), name, SETTINGS[setting], seed)


def stage_controls(work: Work) -> None:
    """Seed 0: shuffled and flipped updates rounded as usual but compared with the real adapter; attention alone."""
    for size in RATES:
        adapter = work.adapter("experts", size, 0)
        for control in ("shuffled", "sign flipped"):
            key = f"{size} {control}"
            if key in work.results:
                continue
            changed = _changed(adapter, work.directory / key.replace(" ", ""), control)
            _, rounded = work.round(AdapterFile.open(changed), f"rounded-{key}".replace(" ", ""), Settings(), 0)
            plan = plan_merge(work.checkpoint, AdapterFile.open(adapter), "mxfp4", "compensated")
            work.keep(key, work.measure(plan, rounded, "test", ["compensated"]))
        key = f"{size} attention alone"
        if key not in work.results:
            source = AdapterFile.open(work.adapter("attention", size, 0))
            plan = plan_merge(work.checkpoint, source, "mxfp4", "nearest")
            work.keep(key, work.measure(plan, None, "test", ["bf16"]))


def _changed(adapter: Path, to: Path, control: str) -> Path:
    """A copy with each expert's B shuffled along its outputs, or negated."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(adapter, to)
    provenance = json.loads((to / PROVENANCE).read_text())
    provenance.pop("files", None)
    (to / PROVENANCE).unlink()
    tensors = load_file(to / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if ".mlp.experts." in name and "lora_B" in name:
            order = torch.randperm(len(tensor), generator=generator)
            tensors[name] = (tensor[order] if control == "shuffled" else -tensor).contiguous()
    save_file(tensors, to / WEIGHTS)
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a tiny base, pretrained for figures that mean something")
    parser.add_argument("--work", type=Path, default=Path("bench-mxfp4"))
    parser.add_argument("--stage", choices=("train", "round", "controls", "settings", "table"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=120, help="held-out examples of each split")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--save", metavar="NAME", help="write the table to bench/results/DATE-NAME")
    args = parser.parse_args()
    if args.synthetic:
        print_synthetic()
        return
    work = Work(args.work, args.base, args.steps, args.rows)
    stages = {
        "train": stage_train,
        "round": stage_round,
        "controls": stage_controls,
        "settings": stage_settings,
        "table": lambda done: say_and_save(done.results, SEEDS, args.save),
    }
    for name, run in stages.items():
        if args.stage in (None, name):
            run(work)


if __name__ == "__main__":
    main()

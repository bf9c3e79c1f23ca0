"""Measure tiny bases: held-out loss of each kind beside a unigram model's, and LoRA's results on it.

python scripts/measure_tiny.py loss                      pretrained, constructed and random base on test documents
python scripts/measure_tiny.py lora OUT [--seeds 0 1]    `finetune train quickstart` on each (minutes per run)
python scripts/measure_tiny.py lora OUT trainer.epochs=1 with changed settings

Each prints a table; `lora` resumes where it was interrupted. `--bases DIR ...` measures other directories instead.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from constructed_base import write_constructed_base
from pretraining.corpus import FILES, Conversations, documents, read_texts
from pretraining.vocabulary import Vocabulary

from finetune import log
from finetune.evaluate.likelihood import held_out_loss
from finetune.model.build import build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.tiny import KINDS, write_tiny_base
from finetune.results import read_evaluation

_ROW_TOKENS = 2048
_TOKENS_PER_DOMAIN = 12_000  # documents from the start of each domain's test split; each token costs 201,088 logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    loss, lora = what.add_parser("loss"), what.add_parser("lora")
    for each in (loss, lora):
        each.add_argument("--bases", nargs="+", type=Path, help="checkpoint directories; without it, one of each kind")
    lora.add_argument("out", type=Path, help="bases and runs go here")
    lora.add_argument("--seeds", nargs="+", type=int, default=[0])
    lora.add_argument("overrides", nargs="*", help="changes to the recipe, such as trainer.epochs=1")
    arguments = parser.parse_args()
    if arguments.what == "loss":
        with tempfile.TemporaryDirectory() as folder:
            measure_loss(arguments.bases or _bases(Path(folder)))
    else:
        measure_lora(arguments.out, arguments.bases or _bases(arguments.out), arguments.seeds, arguments.overrides)


def _bases(folder: Path) -> list[Path]:
    """A base of each kind in a folder, created if missing."""
    for kind in KINDS:
        if not (folder / kind).exists():
            write_tiny_base(folder / kind, kind=kind)
    if not (folder / "constructed").exists():
        write_constructed_base(folder / "constructed")
    return [folder / kind for kind in ("pretrained", "constructed", "random")]


def measure_loss(bases: list[Path]) -> None:
    """Nats per token of test documents among all 201,088 tokens."""
    train, test = read_texts(), read_texts(("test",))
    training_documents = documents(train)
    vocabulary = Vocabulary.of(training_documents, Conversations(train))
    chosen = {}
    for domain in FILES:
        samples, tokens = [], 0
        for sample in documents([text for text in test if text.domain == domain]):
            samples.append(sample)
            if (tokens := tokens + len(sample.ids)) > _TOKENS_PER_DOMAIN:
                break
        chosen[domain] = samples
    log.result("| model | " + " | ".join(FILES) + " | mean |\n|---|" + "---|" * (len(FILES) + 1))
    _say_row("uniform", [math.log(len(vocabulary.number_of))] * len(FILES))
    _say_row("unigram of the training documents", [vocabulary.unigram_loss(chosen[domain]) for domain in FILES])
    for path in bases:
        base = build_base(Checkpoint.open(path), torch.device("cpu"), torch.float32, experts_per_chunk=8)
        losses = [held_out_loss(base.model, samples, _ROW_TOKENS, task=path.name) for samples in chosen.values()]
        _say_row(path.name, [loss.mean for loss in losses])


def _say_row(name: str, losses: list[float]) -> None:
    cells = [f"{loss:.3f}" for loss in (*losses, sum(losses) / len(losses))]
    log.result(f"| {name} | {' | '.join(cells)} |")


def measure_lora(out: Path, bases: list[Path], seeds: list[int], overrides: list[str]) -> None:
    """The quickstart recipe on each base and seed."""
    log.result("| base | seed | steps | test loss | accuracy |\n|---|---|---|---|---|")
    for path in bases:
        for seed in seeds:
            name = "-".join([path.name, str(seed), *(part.replace("=", "_") for part in overrides)])
            run = out / "runs" / name
            if not (run / "evaluation.json").exists():
                given = [f"model.path={path.resolve()}", f"output_dir={run.parent}", f"name={name}", f"seed={seed}"]
                command = ["from finetune.cli.main import entry; entry()", "train", "quickstart", *given, *overrides]
                subprocess.run([sys.executable, "-c", *command, "export.read_back=never"], check=True)
            _say_run(path.name, seed, run)


def _say_run(name: str, seed: int, run: Path) -> None:
    evaluation = read_evaluation(run / "evaluation.json")
    assert evaluation is not None
    steps = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["total_steps"]
    loss, accuracy = (figures.adapter for _, figures in evaluation.headlines())
    log.result(f"| {name} | {seed} | {steps} | {loss.value:.3f} | {accuracy.text()} |")


if __name__ == "__main__":
    main()

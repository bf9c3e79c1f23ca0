"""Pretrain the tiny base that ships in data/base, on the shipped training texts without labels.

python scripts/pretrain_tiny.py OUT                     about an hour of processor time; resumes where it stopped
python scripts/pretrain_tiny.py OUT --cpu-minutes 10    a smaller one
python scripts/pretrain_tiny.py OUT --ship              also puts it into data/base

The corpus is described in pretraining/corpus.py, the training in pretraining/training.py. The schedule follows
processor time, so two runs of the same seed are alike and not equal. scripts/measure_tiny.py measures the result.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from pretraining.corpus import KINDS, Conversations, documents, read_texts
from pretraining.training import Pretraining

from finetune import log
from finetune.config.paths import shipped_dir
from finetune.model.tiny import COMPACT_FILE, write_tiny_base

COMPACT, FIGURES, BASE = "tiny.safetensors.gz", "figures.json", "base"
_HELD_OUT_CONVERSATIONS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of checkpoints and results; a run found there is resumed")
    parser.add_argument("--cpu-minutes", type=float, default=60.0, help="processor time of all threads (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more are faster only on cores that nobody else uses")
    parser.add_argument("--ship", action="store_true", help="put the result into data/base")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = Pretraining(arguments.out, read_texts(), arguments.seed)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # 15 % less time a step where the CPU multiplies bfloat16
    run.train(arguments.cpu_minutes * 60)
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    compact = run.compact()
    content = compact.to_bytes()
    (arguments.out / COMPACT).write_bytes(content)
    if not (arguments.out / BASE).exists():
        write_tiny_base(arguments.out / BASE, compact=type(compact).from_bytes(content))
    figures = {"bytes": len(content), "tokens_of_corpus": len(compact.tokens), **vars(run.place), **_losses(run)}
    (arguments.out / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if arguments.ship:
        (shipped_dir("data") / COMPACT_FILE).write_bytes(content)
    log.result(json.dumps(figures, indent=2))


def _losses(run: Pretraining) -> dict[str, object]:
    """Validation losses with the experts as they were trained and as rounded to MXFP4, beside a unigram model's."""
    texts = read_texts(("val",))
    samples = {}
    for domain in ("legal", "medical", "creative"):
        samples[domain] = documents([text for text in texts if text.domain == domain])
    conversations = Conversations(texts, run.conversations)
    for kind in KINDS:
        generator = np.random.default_rng(0)
        samples[f"conversations: {kind}"] = list(conversations.samples(generator, kind))[:_HELD_OUT_CONVERSATIONS]
    figures: dict[str, object] = {}
    for name, chosen in samples.items():
        run.round_experts(False)
        exact = run.held_out_loss(chosen)
        run.round_experts(True)
        rounded = run.held_out_loss(chosen)
        figures[name] = {
            "unigram": run.vocabulary.unigram_loss(chosen),
            "before rounding": exact,
            "with MXFP4 experts": rounded,
            "cost of rounding": rounded / exact - 1,
        }
        log.info(f"{name}: {figures[name]}")
    return figures


if __name__ == "__main__":
    main()

"""What preference tuning learns on the shipped pairs, beside supervised fine-tuning on the chosen answers.

    python bench/preference_learning.py --base base/tiny [--arms dpo sft] [--seeds 0 1 2] [--steps 80] [--save NAME]

Every run is `finetune train` with a tiny base: as many steps of equally long packed sequences for each arm. Arms are
options of configs/objective/. Reported are held-out pair accuracy before and after, by log-probability of the answer,
and reward accuracy, with 95 % intervals; and two controls: the same after prompts were shuffled among the records, and
the rule that the shorter answer wins.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import machine, publish

from finetune.config.paths import shipped_dir
from finetune.figures import Figure
from finetune.results import read_evaluation

PAIRS = {
    "legal_pairs": "legal/cuad_pairs.jsonl.gz",
    "creative_pairs": "creative/fiction_pairs.jsonl.gz",
    "medical_pairs": "medical/pubmedqa_pairs.jsonl.gz",
}
NOTE = (
    "`before`, `after`: share of held-out pairs whose chosen answer has the higher log-probability, with its 95 % "
    "Wilson interval. `reward`: share whose chosen answer gained more log-probability over the base. `shuffled`: "
    "`after` with prompts exchanged among the records. `shorter`: the rule that the shorter answer wins. sft trains "
    "the chosen answers alone; all arms have the same number of steps of equally long sequences."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="directory of `finetune base tiny DIRECTORY`")
    parser.add_argument("--arms", nargs="+", default=["dpo", "sft"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", default="legal_pairs", choices=list(PAIRS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--pairs", type=int, default=300, help="held-out pairs")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all arms")
    parser.add_argument("--save", metavar="NAME", help="write the table to bench/results/DATE-NAME")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for arm in arguments.arms:
            of_arm = [run(arm, seed, Path(directory), arguments) for seed in arguments.seeds]
            rows += of_arm
            mean = statistics.mean(row["after value"] for row in of_arm)
            rows.append({"arm": arm, "seed": "mean", "after": f"{mean:.3f}"})
    for row in rows:
        row.pop("after value", None)
    facts = machine(torch.device("cpu")) | {"data": arguments.data, "steps": arguments.steps, "settings": arguments.set}
    title = f"Held-out pair accuracy on {arguments.data}, {len(arguments.seeds)} seeds"
    publish(arguments.save or "preference-learning", title, facts, rows, save=bool(arguments.save), note=NOTE)


def run(arm: str, seed: int, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one arm with one seed; returns its line of the table."""
    name = f"{arm}-{seed}"
    common = [
        f"model.path={Path(arguments.base).resolve()}", f"name={name}", f"output_dir={directory}", f"seed={seed}",
        f"trainer.max_steps={arguments.steps}", "data.max_length=2048", f"evaluate.test_examples={arguments.pairs}",
        "evaluate.every_steps=null", "evaluate.validation_examples=null", "save.every_steps=null", *arguments.set,
    ]  # fmt: skip
    if arm == "sft":
        own = ["quickstart", *supervised_data(directory, arguments.data)]
    else:
        own = ["preference_tiny", f"data={arguments.data}", f"objective={arm}"]
    print(f"{name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "finetune", "train", *own, *common]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{' '.join(command)}\n{finished.stderr}")
    evaluation = read_evaluation(directory / name / "evaluation.json")
    assert evaluation and evaluation.test and evaluation.test.pairs
    pairs = evaluation.test.pairs
    assert pairs.accuracy.adapter is not None
    with (directory / name / "metrics.jsonl").open(encoding="utf-8") as file:
        tokens = sum(json.loads(line).get("tokens", 0) for line in file)
    return {
        "arm": arm,
        "seed": seed,
        "tokens": tokens,
        "before": _text(pairs.accuracy.base),
        "after": _text(pairs.accuracy.adapter),
        "reward": _text(pairs.reward_accuracy),
        "shuffled": _text(pairs.shuffled.adapter if pairs.shuffled else None),
        "shorter": _text(pairs.shorter_wins),
        "after value": pairs.accuracy.adapter.value,
    }


def supervised_data(directory: Path, data: str) -> list[str]:
    """Settings that train the chosen answers of the training pairs and test on the held-out pairs."""
    chosen = directory / "chosen.jsonl"
    with gzip.open(shipped_dir("data") / PAIRS[data], "rt", encoding="utf-8") as file, chosen.open("w") as out:
        for pair in map(json.loads, file):
            if pair["split"] == "train":
                messages = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
                out.write(json.dumps({"id": pair["id"], "messages": messages}) + "\n")
    return [
        "data=own",
        f"data.train.chosen.path={chosen}",
        f"data.test.pairs.path=shipped://{PAIRS[data]}",
        "data.test.pairs.where.split=test",
        "data.reasoning_effort=low",
    ]


def _text(figure: Figure | None) -> str:
    return "-" if figure is None else figure.text()


if __name__ == "__main__":
    main()

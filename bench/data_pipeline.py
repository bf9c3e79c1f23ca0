"""Measure the data pipeline: tokens/s of tokenising, masking and packing, beside TRL's on the same records, and memory.

    python bench/data_pipeline.py speed [--trl DIRECTORY] [--out FILE]
    python bench/data_pipeline.py memory [--rows 10000 100000] [--out FILE]

`DIRECTORY` holds TRL (`pip install --no-deps --target DIRECTORY trl==1.16.0`); it must not be installed into the
toolkit's own environment. Every measurement runs in a process of its own, on one core; loading the vocabulary is not
counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEGAL = ROOT / "data" / "legal" / "cuad_clause_type.jsonl.gz"
MAX_LENGTH = 4096
REPEATS = 3


def legal_rows() -> list[dict]:
    with gzip.open(LEGAL, "rt") as file:
        return [row for row in map(json.loads, file) if row["split"] == "train"]


def our_config(path: Path, cache: Path):
    from finetune.config.schema import DataConfig, SourceConfig

    return DataConfig(train={"rows": SourceConfig(path=str(path))}, max_length=MAX_LENGTH, cache_dir=str(cache))


def ours(path: Path) -> dict:
    """From the JSONL file to an Arrow file of tokens, weights and channels, and the packed sequences of an epoch."""
    import numpy as np

    from finetune.data.dataset import load_split
    from finetune.data.harmony.tokenizer import harmony_encoding
    from finetune.data.packing import pack, packing_efficiency

    harmony_encoding()
    clocks = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as cache:
            clock = Clock()
            split = load_split(our_config(path, Path(cache)), "train")
            lengths = split.examples.lengths.tolist()
            rows = pack(lengths, MAX_LENGTH, np.random.default_rng(0))
            clocks.append(clock.stop())
    return figures(split.stats.num_tokens, clocks, len(rows), packing_efficiency(lengths, rows, MAX_LENGTH))


def trl(path: Path, processes: int | None) -> dict:
    """TRL's own `SFTTrainer._prepare_dataset` with its gpt-oss training template; reading the file is not counted."""
    import datasets
    import trl
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from finetune.data.harmony.tokenizer import write_tokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        template = (Path(trl.__file__).parent / "chat_templates" / "gptoss_training.jinja").read_text()
        args = SFTConfig(
            folder, max_length=MAX_LENGTH, packing=True, assistant_only_loss=True, dataset_num_proc=processes,
            bf16=False, use_cpu=True,
        )  # fmt: skip
        trainer = object.__new__(SFTTrainer)  # no model is needed to prepare data
        trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = tokenizer, template, False
        messages = [json.loads(line)["messages"] for line in path.open()]
        clocks = []
        for _ in range(REPEATS):
            rows = datasets.Dataset.from_dict({"messages": messages})
            clock = Clock()
            prepared = trainer._prepare_dataset(rows, tokenizer, args, True, None, "train")
            clocks.append(clock.stop())
    num_tokens = sum(map(len, prepared["input_ids"]))
    return figures(num_tokens, clocks, len(prepared), num_tokens / (len(prepared) * MAX_LENGTH))


def memory(path: Path) -> dict:
    """Anonymous memory (what cannot be given back) while building and while an epoch's batches are made."""
    from finetune.config.schema import TrainerConfig
    from finetune.data.dataset import load_split
    from finetune.data.harmony.tokenizer import harmony_encoding
    from finetune.data.plan import BatchPlan

    harmony_encoding()
    before = memory_mib()
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        split = load_split(our_config(path, Path(cache)), "train")
        build_seconds, built = time.perf_counter() - started, memory_mib()
        plan = BatchPlan(split.examples, our_config(path, Path(cache)), TrainerConfig(), 0)
        steps = plan.steps(0)
        for step in steps:
            for micro_step in step:
                plan.batch(micro_step)
        after = memory_mib()
        disk = sum(file.stat().st_size for file in Path(cache).rglob("*")) / 2**20
    return {
        "rows": len(split.examples),
        "tokens": split.stats.num_tokens,
        "before_mib": before,
        "after_building_mib": built,
        "after_an_epoch_mib": after,
        "cache_mib": round(disk),
        "build_seconds": round(build_seconds, 1),
    }


def memory_mib() -> dict:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: round(int(status[name].split()[0]) / 1024) for name in ("RssAnon", "RssFile", "VmHWM")}


class Clock:
    """Wall and processor seconds, child processes included; the latter hold on a busy machine too."""

    def __init__(self) -> None:
        self._start = self._now()

    def stop(self) -> tuple[float, float]:
        return tuple(now - then for now, then in zip(self._now(), self._start, strict=True))

    @staticmethod
    def _now() -> tuple[float, float]:
        times = os.times()
        return time.perf_counter(), times.user + times.system + times.children_user + times.children_system


def figures(num_tokens: int, clocks: list[tuple[float, float]], num_rows: int, efficiency: float) -> dict:
    wall, processor = zip(*clocks, strict=True)
    return {
        "tokens": num_tokens,
        "seconds": [round(value, 3) for value in wall],
        "processor_seconds": [round(value, 3) for value in processor],
        "tokens_per_second": round(num_tokens / min(wall)),
        "tokens_per_processor_second": round(num_tokens / min(processor)),
        "packed_rows": num_rows,
        "packing_efficiency": round(efficiency, 5),
    }


def in_fresh_process(task: str, path: Path, extra_path: str | None = None) -> dict:
    paths = [str(ROOT), *([extra_path] if extra_path else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--task", task, "--file", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict:
    rows = legal_rows()
    result: dict = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load_average": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        if arguments.what == "memory":
            result["memory"] = []
            for count in arguments.rows:
                with path.open("w") as file:
                    file.writelines(json.dumps(rows[number % len(rows)]) + "\n" for number in range(count))
                result["memory"].append(in_fresh_process("memory", path))
            return result
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result["finetune"] = in_fresh_process("ours", path)
        if arguments.trl:
            for name in ("trl", "trl2"):
                result[name] = in_fresh_process(name, path, arguments.trl)
                for unit in ("tokens_per_second", "tokens_per_processor_second"):
                    times = result["finetune"][unit] / result[name][unit]
                    result[name][f"finetune_is_times_as_fast_in_{unit}"] = round(times, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory"], nargs="?")
    parser.add_argument("--trl", help="directory with TRL in it")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--task", choices=["ours", "trl", "trl2", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tasks = {"ours": ours, "memory": memory, "trl": lambda path: trl(path, None), "trl2": lambda path: trl(path, 2)}
    if arguments.task:
        print(json.dumps(tasks[arguments.task](arguments.file)))
        return
    result = json.dumps(measure(arguments), indent=2)
    print(result)
    if arguments.out:
        arguments.out.write_text(result + "\n")


if __name__ == "__main__":
    main()

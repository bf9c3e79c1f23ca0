"""Measure the shape of the code: sizes, hops from a command to the line that does the work, start-up times.

    python scripts/structure.py                 # sizes, hops and start-up
    python scripts/structure.py --only sizes    # or hops, or startup
    python scripts/structure.py --json out.json

Hops: the command runs on a tiny base under `sys.setprofile`; when the named function is entered, the distinct project
files on the call stack are counted, from `cli/<command>.py` (not counted) to the function's file. Where it is entered
by several ways, the shortest counts.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finetune"
STARTUP_COMMANDS = (("--help",), ("config", "show", "quickstart"), ("estimate", "legal_20b"))
STARTUP_REPEATS = 3
SMALL_FILE = 60
LONG_FUNCTION = 60
ALIASES = "JsonObject|ConfigJson|Plain|Overrides|Json"  # names of dict[str, Any], for JSON and configuration as data


@dataclass(frozen=True)
class Question:
    """A place that a reader looks for, and the limit on the files needed to reach it.

    Attributes:
        name: as docs/CONTRIBUTING.md lists it.
        command: the `finetune` command that passes there.
        file, function: where the work is done, the file relative to the package.
        limit: files beyond `cli/<command>.py`.
    """

    name: str
    command: str
    file: str
    function: str
    limit: int


QUESTIONS = (
    Question("the loss", "train", "objectives/sft.py", "weighted_nll", 4),
    Question("LoRA on an expert", "generate", "kernels/experts.py", "_lora_linear", 4),
    Question("LoRA on an expert, from train", "train", "kernels/experts.py", "_lora_linear", 5),
    Question("the learning rate", "train", "train/optim.py", "learning_rate", 3),
    Question("a checkpoint", "train", "train/checkpoint.py", "save_checkpoint", 3),
    Question("a record becomes tokens", "data", "data/harmony/encode.py", "encode_text", 3),
    Question("a merge rounds", "export", "rounding/compensate.py", "compensate", 3),
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the package; lines are physical lines."""

    files: int
    lines: int
    median_file: float
    largest_file: int
    largest_name: str
    over_400: list[str]
    under_60: list[str]
    untyped_records: int
    untyped_by_package: dict[str, int]
    untyped_aliases: int
    functions: int
    median_function: float
    longest_function: int
    over_60_lines: list[str]


def package_files() -> list[Path]:
    """Python files of the package, in order."""
    return sorted(PACKAGE.rglob("*.py"))


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield f"{path.relative_to(PACKAGE)}:{node.name}", node.end_lineno - node.lineno + 1


def measure_sizes() -> Sizes:
    """Count files, lines, functions and records typed as `dict[str, Any]` or `Mapping[str, Any]`."""
    texts = {path: path.read_text(encoding="utf-8") for path in package_files()}
    lines = {str(path.relative_to(PACKAGE)): text.count("\n") for path, text in texts.items()}
    functions = dict(item for path in texts for item in _functions(path))
    untyped: dict[str, int] = {}
    for path, text in texts.items():
        count = sum(text.count(f"{kind}[str, Any]") for kind in ("dict", "Mapping"))
        if count:
            part = path.relative_to(PACKAGE).parts[0]
            untyped[part] = untyped.get(part, 0) + count
    counted = {name: count for name, count in lines.items() if not name.endswith("__init__.py")}
    largest = max(counted, key=lambda name: counted[name])
    return Sizes(
        files=len(counted),
        lines=sum(lines.values()),
        median_file=statistics.median(counted.values()),
        largest_file=counted[largest],
        largest_name=largest,
        over_400=sorted(name for name, count in counted.items() if count > 400),
        under_60=sorted(name for name, count in counted.items() if count < SMALL_FILE),
        untyped_records=sum(untyped.values()),
        untyped_by_package=dict(sorted(untyped.items())),
        untyped_aliases=sum(len(re.findall(rf"\b(?:{ALIASES})\b(?! =)", text)) for text in texts.values()),
        functions=len(functions),
        median_function=statistics.median(functions.values()),
        longest_function=max(functions.values()),
        over_60_lines=sorted(name for name, count in functions.items() if count > LONG_FUNCTION),
    )


@dataclass(frozen=True)
class Hops:
    """Project files on the call stack from a command to a question's function, in order; None: it was not entered."""

    name: str
    limit: int
    files: list[str] | None


def _files_on_stack(frame: FrameType | None) -> list[str]:
    """Distinct project files from the command's module (left out) down to the frame."""
    files: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            files.append(path.relative_to(PACKAGE).as_posix())
        frame = frame.f_back
    files.reverse()
    commands = [place for place, file in enumerate(files) if file.startswith("cli/") and file != "cli/main.py"]
    below = files[commands[0] + 1 :] if commands else files
    first = files[commands[0]] if commands else ""
    return [file for file in dict.fromkeys(below) if file != first]


def measure_hops(questions: tuple[Question, ...] = QUESTIONS) -> list[Hops]:
    """Run the commands on a tiny base, in this process, and watch for the questions' functions."""
    from finetune.cli.main import main

    wanted: dict[tuple[str, str, str], Question] = {
        (question.command, str(PACKAGE / question.file), question.function): question for question in questions
    }
    running = ""
    found: dict[str, list[str]] = {}

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        question = wanted.get((running, frame.f_code.co_filename, frame.f_code.co_name))
        if question is not None:
            files = _files_on_stack(frame)
            if question.name not in found or len(files) < len(found[question.name]):
                found[question.name] = files

    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        run = ["output_dir=" + str(place), "name=run", f"model.path={place / 'base'}"]
        small = ["trainer.max_steps=2", "evaluate.test_examples=2", "evaluate.validation_examples=2"]
        small += [
            "evaluate.labels=never",
            "evaluate.routing_examples=0",
            "save.background=false",
            "data.max_length=256",
        ]
        small += ["data.train.cuad.limit=200", "data.validation.cuad.limit=40", "data.test.cuad.limit=40"]
        small += ["data.too_long=drop", f"data.cache_dir={place / 'cache'}", "export.read_back=never"]
        commands = (
            ["base", "tiny", str(place / "base"), "--kind", "random"],
            ["train", "quickstart", *run, *small, "export.survival_examples=0", "export.calibration_tokens=512"],
            [
                "data",
                "preview",
                "quickstart",
                "-n",
                "1",
                *run[2:],
                f"data.cache_dir={place / 'other-cache'}",
                "data.train.cuad.limit=20",
            ],
            ["generate", str(place / "run"), "Hello", "--max-tokens", "2"],
            ["export", str(place / "run"), "--to", "mxfp4", "--out", str(place / "merged"), "--no-verify"],
        )
        for command in commands:
            running = command[0]
            sys.setprofile(watch)
            try:
                code = main(command)
            finally:
                sys.setprofile(None)
            if code not in (0, 6):
                raise SystemExit(f"finetune {' '.join(command)} ended with exit code {code}")
    return [Hops(question.name, question.limit, found.get(question.name)) for question in questions]


def measure_startup() -> dict[str, float]:
    """Least processor seconds of commands that load no model, over a few runs each."""
    seconds = {}
    for command in STARTUP_COMMANDS:
        times = []
        for _ in range(STARTUP_REPEATS):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "finetune", *command], capture_output=True, check=True, cwd=ROOT)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        seconds[" ".join(command)] = round(min(times), 3)
    return seconds


def _print_sizes(sizes: Sizes) -> None:
    print(f"{sizes.files} files (without __init__), {sizes.lines:,} lines; file median {sizes.median_file:g}, ", end="")
    print(f"largest {sizes.largest_file} ({sizes.largest_name})")
    print(f"{sizes.functions:,} functions, median {sizes.median_function:g}, longest {sizes.longest_function} lines")
    print(f"{sizes.untyped_records} dict[str, Any] or Mapping[str, Any]: {sizes.untyped_by_package}; ", end="")
    print(f"their aliases are named {sizes.untyped_aliases} times, imports included")
    print(f"over 400 lines: {', '.join(sizes.over_400) or 'none'}")
    print(f"functions over {LONG_FUNCTION} lines: {', '.join(sizes.over_60_lines) or 'none'}")
    print(f"under {SMALL_FILE} lines: {', '.join(sizes.under_60) or 'none'}")


def _print_hops(hops: list[Hops]) -> None:
    for hop in hops:
        if hop.files is None:
            print(f"{hop.name}: NOT REACHED (the function was renamed?)")
        else:
            verdict = "ok" if len(hop.files) <= hop.limit else "TOO MANY"
            print(f"{hop.name}: {len(hop.files)} of at most {hop.limit} ({verdict}): {' -> '.join(hop.files)}")


def main() -> int:
    """Print what was asked for; 1 if a question takes more files than its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("sizes", "hops", "startup"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, object] = {}
    failed = False
    if options.only in (None, "sizes"):
        sizes = measure_sizes()
        _print_sizes(sizes)
        result["sizes"] = asdict(sizes)
    if options.only in (None, "hops"):
        hops = measure_hops()
        _print_hops(hops)
        result["hops"] = [asdict(hop) for hop in hops]
        failed = any(hop.files is None or len(hop.files) > hop.limit for hop in hops)
    if options.only in (None, "startup"):
        startup = measure_startup()
        for command, seconds in startup.items():
            print(f"finetune {command}: {seconds:.3f} processor seconds")
        result["startup"] = startup
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Start-up time of the command line, and a check that torch is not imported: `python bench/startup.py`."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from statistics import median

COMMANDS = [
    ["--help"],
    ["recipes"],
    ["completion", "candidates", "--", "finetune train legal_20b trainer.lea"],
    ["config", "show", "legal_20b"],
    ["estimate", "legal_20b"],
]
CODE = (
    "import sys; from finetune.cli.main import main; code = main(sys.argv[1:]); "
    "print('heavy:', *sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
)
RUNS = 7


def measure(arguments: list[str]) -> tuple[float, float, str]:
    """Processor seconds, wall seconds, and which heavy libraries were imported."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 or "--help" in arguments, done.stderr
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    heavy = [line.removeprefix("heavy:").strip() for line in done.stderr.splitlines() if line.startswith("heavy:")]
    return processor, wall, heavy[0] if heavy else ""


def main() -> None:
    print(f"{RUNS} fresh processes each, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    print(f"{'finetune ...':62} {'processor s':>12} {'wall s, least':>14}  torch, transformers")
    for arguments in COMMANDS:
        found = [measure(arguments) for _ in range(RUNS)]
        processor, wall = median(row[0] for row in found), min(row[1] for row in found)
        print(f"{' '.join(arguments):62} {processor:12.2f} {wall:14.2f}  {found[-1][2] or 'not imported'}")


if __name__ == "__main__":
    main()

"""What an optimiser step costs on a GPU, counted without one: `python bench/cost_model.py --help`.

The recipe's real optimiser step runs at full widths on fake CUDA tensors: every launch, byte, floating-point operation,
host wait and allocation is counted, and assumed rates (`bench/fake_cuda/rates.py`) turn them into time. The counts are
exact and the same on every machine with one version of torch; times are arithmetic, right within about a quarter.

It needs a CPU build of torch and g++ (exit 5 otherwise), and about ten seconds for 20b.

    python bench/cost_model.py --shape 20b --gpu h100
    python bench/cost_model.py --shape 120b --gpu a100 trainer.micro_batch_size=2 trainer.gradient_accumulation_steps=2
    python bench/cost_model.py --shape 20b --gpu h100 --best     at every micro-batch size
    python bench/cost_model.py --counts                          write the counts that a test compares with
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fake_cuda.device import NoFakeDevice, load_guard, one_gpu

COUNTS_FILE = Path(__file__).with_name("results") / "cost-model-counts.json"
MACHINE_LACKS_SOMETHING = 5


def main() -> int:
    """Run the command; returns its exit code."""
    options = _options()
    try:
        load_guard()
    except NoFakeDevice as reason:
        print(f"error: {reason}", file=sys.stderr)
        print("fix: run it in an environment with a CPU build of torch and g++", file=sys.stderr)
        return MACHINE_LACKS_SOMETHING
    # torch only knows of the fake device if it is imported after the guard.
    from fake_cuda import report
    from fake_cuda.rates import GPUS

    gpu = GPUS[options.gpu]
    with one_gpu(gpu.capability):
        if options.counts:
            COUNTS_FILE.write_text(json.dumps(report.all_counts(COUNTS_FILE), indent=1) + "\n", encoding="utf-8")
            return 0
        work = report.work_of(options)
        if options.best:
            report.print_micro_batches(work, options.gpu)
        else:
            report.print_step(work, options.gpu, save=options.save)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["20b", "120b"], default="20b", help="published model (default: 20b)")
    parser.add_argument("--gpu", choices=["h100", "h200", "a100", "4090", "b200"], default="h100")
    parser.add_argument("--recipe", help="recipe (default: legal_20b or legal_120b)")
    parser.add_argument("--trained", type=float, default=1.0, help="share of tokens that are trained (default: all)")
    parser.add_argument("--example", type=int, help="tokens of an example (default: a whole sequence)")
    parser.add_argument("--adapted", type=int, help="experts of each layer with LoRA (default: all)")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--best", action="store_true", help="compare micro-batch sizes")
    parser.add_argument("--counts", action="store_true", help=f"write {COUNTS_FILE.name}")
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, key=value")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

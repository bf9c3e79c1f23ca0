"""The chunked loss head beside torch's own: `python bench/loss_head.py --help`.

Time and memory of loss and gradient of N tokens over the whole vocabulary, the head frozen, a weight for each token:
this project's, `torch.nn.functional.linear_cross_entropy` with its options (torch 2.13), and plain logits. The head is
random and `--hidden` wide; differences are against float64 logits of the same inputs.
"""

from __future__ import annotations

import argparse
import warnings

import torch
import torch.nn.functional as F
from measure import interleaved, machine, peak_bytes, publish, summary
from torch import Tensor

from finetune.kernels.loss_head import token_nll


def losses(vocabulary: int) -> dict[str, object]:
    """Functions (hidden, head, targets) -> NLL of each token, by name."""

    def plain(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")

    found: dict[str, object] = {"ours": token_nll, "plain logits": plain}
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None:
        for name, chosen in (
            ("library, its chunks", options()),
            ("library, 512 tokens", options(batch_chunk_size=512)),
        ):

            def library(hidden: Tensor, head: Tensor, targets: Tensor, chosen: object = chosen) -> Tensor:
                return F.linear_cross_entropy(hidden, head, targets, reduction="none", options=chosen)

            found[name] = library
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=2880)
    parser.add_argument("--vocabulary", type=int, default=201_088)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-loss-head.{json,md}")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    facts = machine(device)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, device=device).to(dtype).requires_grad_()
    head = (torch.randn(args.vocabulary, args.hidden, device=device) * args.hidden**-0.5 * 3).to(dtype)
    targets = torch.randint(args.vocabulary, (args.tokens,), device=device)
    weights = torch.rand(args.tokens, device=device)
    calls, rows = {}, []
    for name, loss in losses(args.vocabulary).items():

        def call(loss=loss) -> tuple[Tensor, Tensor]:
            nll = loss(hidden, head, targets)
            return nll.detach(), torch.autograd.grad((nll * weights).sum(), hidden)[0]

        calls[name] = call
    count = min(args.tokens, 64)
    exact = F.cross_entropy(hidden[:count].double() @ head.double().T, targets[:count], reduction="none").detach()
    seconds = interleaved(calls, args.repeats, device)
    for name, call in calls.items():
        nll, grad = call()
        rows.append(
            {"loss head": name, "tokens": args.tokens, **summary(seconds[name])}
            | {"peak MB": round(peak_bytes(call, device) / 1e6, 1)}
            | {"largest error, nats": (nll[:count].double() - exact).abs().max().item()}
            | {"gradient norm": round(grad.double().norm().item(), 6)}
        )
    note = (
        f"Hidden {args.hidden}, vocabulary {args.vocabulary:,}, {str(dtype).removeprefix('torch.')}; loss and gradient."
    )
    publish("loss-head", "Loss head", facts, rows, save=args.save, note=note)


if __name__ == "__main__":
    main()

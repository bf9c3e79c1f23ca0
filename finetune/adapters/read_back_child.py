"""Runs in a fresh process: third-party code alone loads the base and the adapter and computes logits.

Deliberately imports nothing of this package. Called as `python read_back_child.py REQUEST.json`; writes the result as
JSON to standard output. The request names the base and adapter directories, a safetensors file with the sequences and
the live model's logits, and the dtype to compute in. Without an adapter the "base" is a merged checkpoint, which is
compared with what the live model computed with the adapter on.
"""

import json
import os
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mxfp4Config


def main(request_path: str) -> None:
    """Load, compare, print."""
    with open(request_path) as file:
        request = json.load(file)
    dtype = getattr(torch, request["dtype"])
    with open(os.path.join(request["base"], "config.json")) as file:
        packed = "quantization_config" in json.load(file)
    base, info = AutoModelForCausalLM.from_pretrained(
        request["base"],
        # MXFP4 values are exact in bfloat16, so dequantising there and widening loses nothing.
        dtype=torch.bfloat16,
        **({"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}),
        attn_implementation="eager",
        output_loading_info=True,
    )
    problems = {f"base {kind}": sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    base = base.to(dtype).eval()
    result: dict[str, object] = {}
    live = load_file(request["tensors"])
    before = _logits(base, live)
    if request.get("adapter") is None:
        result["problems"] = {kind: keys for kind, keys in problems.items() if keys}
        result |= {kind: _compare(before, live, kind) for kind in ("adapted", "base", "merged") if f"{kind}.0" in live}
        print("RESULT " + json.dumps(result))
        return
    model = PeftModel.from_pretrained(base, request["adapter"], adapter_name="checked").eval()
    loaded = model.load_adapter(request["adapter"], adapter_name="checked")
    problems["adapter missing"] = [key for key in loaded.missing_keys if "lora_" in key]
    problems["adapter unexpected"] = list(loaded.unexpected_keys)
    after = _logits(model, live)
    result["problems"] = {kind: keys for kind, keys in problems.items() if keys}
    result["adapted"] = _compare(after, live, "adapted")
    result["disabled"] = _compare(before, live, "base")
    # The same comparison for an adapter that does nothing: the difference that has to be noticed.
    result["effect"] = _compare(before, live, "adapted")
    print("RESULT " + json.dumps(result))


@torch.no_grad()
def _logits(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    count = sum(name.startswith("ids.") for name in tensors)
    return [model(input_ids=tensors[f"ids.{n}"][None]).logits[0, tensors[f"where.{n}"]].float() for n in range(count)]


def _compare(theirs: list[torch.Tensor], live: dict[str, torch.Tensor], kind: str) -> dict[str, float]:
    """Largest difference, mean KL(live || theirs) in nats, and share of positions with the same likeliest token."""
    largest, kl, agree, positions = 0.0, 0.0, 0, 0
    for number, logits in enumerate(theirs):
        wanted = live[f"{kind}.{number}"].float()
        largest = max(largest, (logits - wanted).abs().max().item())
        log_p, log_q = wanted.log_softmax(-1), logits.log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agree += int((logits.argmax(-1) == wanted.argmax(-1)).sum())
        positions += len(logits)
    return {"max_difference": largest, "mean_kl": kl / positions, "argmax_agreement": agree / positions}


if __name__ == "__main__":
    main(sys.argv[1])

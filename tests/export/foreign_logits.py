"""Logits of a base with an adapter, from third-party code alone: `python foreign_logits.py KIND BASE ADAPTER IDS OUT`.

KIND is `peft` (transformers and PEFT), `mlx` (mlx-lm in float32) or `llama` (llama.cpp through xllamacpp). IDS is JSON;
OUT a .npy of log-probabilities: float64 [T, V], for `llama` [N, 2] of the next token's likeliest (id, log-probability).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def peft_logits(base: str, adapter: str, ids: list[int]) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    ).float()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()


def mlx_logits(base: str, adapter: str, ids: list[int]) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(base))
    if adapter:
        model = load_adapters(model, adapter)
    model.set_dtype(mx.float32)
    model.eval()
    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32)).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # mlx's own float32 sum over 201,088 loses 2e-4


def llama_logits(base: str, adapter: str, ids: list[int]) -> np.ndarray:
    import xllamacpp as xlc

    params = xlc.CommonParams()
    params.model.path = base
    params.n_ctx, params.n_gpu_layers, params.warmup = 256, 0, False
    params.cpuparams.n_threads = 1
    # Defaults that round: a float16 key-value cache and flash attention.
    params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        params.lora_adapters = [xlc.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xlc.Server(params)
    request = {"prompt": ids, "n_predict": 1, "n_probs": 50, "temperature": 0.0, "post_sampling_probs": False}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    content = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return np.array([[entry["id"], entry["logprob"]] for entry in content])


if __name__ == "__main__":
    kind, base_path, adapter_path, token_ids, out = sys.argv[1:]
    compute = {"peft": peft_logits, "mlx": mlx_logits, "llama": llama_logits}[kind]
    np.save(out, compute(base_path, adapter_path, json.loads(token_ids)))

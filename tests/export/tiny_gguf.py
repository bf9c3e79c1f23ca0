"""A gpt-oss base in float32 GGUF, written from transformers' own dequantised weights, without this project's code.

Float32 because llama.cpp rounds activations to bfloat16 beside bfloat16 weights, which alone moves log-probabilities of
the tiny base by 0.1. The vocabulary is made of names, since prompts are given as token ids.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}


def write_float32_gguf(base: Path, path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_type("model")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    writer.add_rope_scaling_orig_ctx_len(config["rope_scaling"]["original_max_position_embeddings"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list([f"t{number}" for number in range(config["vocab_size"])])
    writer.add_token_merges(["t 1"])
    for name, tensor in _tensors(base, config["num_hidden_layers"]):
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(base: Path, num_layers: int) -> list[tuple[str, torch.Tensor]]:
    state = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).state_dict()
    tensors = [
        ("token_embd.weight", state["model.embed_tokens.weight"]),
        ("output_norm.weight", state["model.norm.weight"]),
        ("output.weight", state["lm_head.weight"]),
    ]
    for number in range(num_layers):
        path, block = f"model.layers.{number}.", f"blk.{number}."
        for ours, theirs in ATTENTION.items():
            for part in ("weight", "bias"):
                tensors.append((f"{block}{theirs}.{part}", state[f"{path}self_attn.{ours}.{part}"]))
        gate_up, down = (state[f"{path}mlp.experts.{name}"].mT for name in ("gate_up_proj", "down_proj"))
        gate_up_bias = state[f"{path}mlp.experts.gate_up_proj_bias"]
        tensors += [
            (f"{block}attn_sinks.weight", state[f"{path}self_attn.sinks"]),
            (f"{block}attn_norm.weight", state[f"{path}input_layernorm.weight"]),
            (f"{block}post_attention_norm.weight", state[f"{path}post_attention_layernorm.weight"]),
            (f"{block}ffn_gate_inp.weight", state[f"{path}mlp.router.weight"]),
            (f"{block}ffn_gate_inp.bias", state[f"{path}mlp.router.bias"]),
            (f"{block}ffn_gate_exps.weight", gate_up[:, 0::2]),
            (f"{block}ffn_up_exps.weight", gate_up[:, 1::2]),
            (f"{block}ffn_gate_exps.bias", gate_up_bias[:, 0::2]),
            (f"{block}ffn_up_exps.bias", gate_up_bias[:, 1::2]),
            (f"{block}ffn_down_exps.weight", down),
            (f"{block}ffn_down_exps.bias", state[f"{path}mlp.experts.down_proj_bias"]),
        ]
    return tensors

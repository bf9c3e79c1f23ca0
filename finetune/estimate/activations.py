"""What a micro-step makes and drops, tensor by tensor: kept activations, expert chunks, attention, the loss head.

Each number in front of a size counts tensors of that size, as `tests/estimate/test_estimate_step.py` finds them alive
in a real step. Letters are those of the kernels: T tokens, D hidden, F expert width, E experts, K active ones,
R = T·K routed tokens, Q and V widths of all query and of all key heads, H heads; c is the bytes of an activation.
"""

from __future__ import annotations

from finetune.estimate.inputs import StepShape
from finetune.estimate.parts import Part, layer_gradient_bytes
from finetune.estimate.shapes import BaseShape

HEAD_TOKENS = 512  # finetune.kernels.loss_head.TOKENS_PER_CHUNK
HEAD_SLICE = 16_384  # words, finetune.kernels.loss_head
QUERIES_PER_BLOCK = 256  # finetune.kernels.attention.QUERIES_PER_BLOCK
PAD_ALIGNMENT = 32  # finetune.kernels.experts_triton.PAD_ALIGNMENT
INDEX_BYTES = 8

CHECKPOINTS = "activation checkpoints"
ROUTING = "router logits, all layers"
LAYER = "activations of the layer in work"
ALL_LAYERS = "activations of all layers"
SCRATCH = "expert scratch (a chunk)"
ROWS = "routed rows of experts"
ATTENTION_SPACE = "attention workspace"
HEAD_CHUNK = "loss-head chunk"


def kept_activations(base: BaseShape, step: StepShape) -> Part:
    """What the forward pass leaves for the backward pass: each layer's input, or everything in it."""
    if not step.checkpointing:
        return Part(ALL_LAYERS, base.num_layers * layer_activations(base, step), "nothing is recomputed")
    kept = base.num_layers * step.tokens * base.hidden * step.compute_bytes
    detail = f"{base.num_layers} layers x {step.tokens:,} tokens x {base.hidden:,}"
    return Part(CHECKPOINTS, 0 if step.offload else kept, detail + (", on CPU" if step.offload else ""))


def layer_activations(base: BaseShape, step: StepShape) -> float:
    """Bytes that one layer's own graph keeps between its forward and its backward."""
    return attention_activations(base, step) + expert_inputs(base, step)


def attention_activations(base: BaseShape, step: StepShape) -> float:
    """Attention half: normed input, q, output and o_proj's input, k and v, log-sums; the norm's float32 copy."""
    c, targets = step.compute_bytes, step.attention_targets if step.attention_rank else ()
    # A projection's input is kept for its LoRA-A alone: the frozen weight needs none. o_proj's is a copy of the
    # attention's output only in batches of one row, where queries are seen through transposed strides.
    copied = "o_proj" in targets and step.rows == 1
    inputs = base.hidden * bool({"q_proj", "k_proj", "v_proj"} & set(targets)) + base.query_size * copied
    kept = c * (inputs + 2 * base.query_size + 2 * base.kv_size) + 4 * base.num_heads
    return step.tokens * (kept + 4 * base.hidden)


def expert_inputs(base: BaseShape, step: StepShape) -> float:
    """Expert half: the normed input and the norm's float32 copy, routing weights, ids and the order of the rows."""
    c = step.compute_bytes
    routing = base.num_active_experts * (c + 2 * INDEX_BYTES)
    return step.tokens * (base.hidden * (c + 4) + routing)


def routing_tape(base: BaseShape, step: StepShape) -> Part:
    """Router logits of every layer, and their float32 softmax in the balance loss's graph."""
    per_token = base.num_experts * (step.compute_bytes + 4)
    return Part(ROUTING, base.num_layers * step.tokens * per_token)


def expert_backward(base: BaseShape, step: StepShape) -> list[Part]:
    """The expert block's backward at its busiest chunk: the rows are gathered, computed again and led back.

    The reference replays a chunk under autograd. The Triton block holds rows [x | LoRA | 1], gate_up's product, two
    gradients, the activation and its update's gradient, and weights that carry LoRA-B and bias in extra columns.
    """
    c, routed = step.compute_bytes, step.tokens * base.num_active_experts
    chunk = step.experts_per_chunk
    rows = min(routed, routed * chunk / base.num_experts * step.busiest_chunk)
    hidden, width = base.hidden, base.expert_width
    if step.expert_kernel == "triton":
        pad = -(-(step.highest_rank + 1) // PAD_ALIGNMENT) * PAD_ALIGNMENT
        weights = chunk * (2 * width * (hidden + pad) + hidden * (width + pad))
        per_row = 2 * hidden + 5 * width + 2 * pad
        adapted = max(step.adapted_experts, default=0)
        narrow = adapted * step.expert_rank * (hidden + width) if step.adapter_bytes > c else 0
    else:
        weights, narrow = chunk * base.expert_weights, 0
        per_row = 7 * width + (6 if step.expert_rank else 5) * hidden
    gathered = routed * hidden  # the gradient of every routed row, until all chunks are done
    return [
        Part(SCRATCH, c * (weights + narrow), f"{chunk} experts in {8 * c} bits"),
        Part(ROWS, c * (gathered + rows * per_row), f"{rows:,.0f} of {routed:,} rows in the busiest chunk"),
    ]


def attention_backward(base: BaseShape, step: StepShape) -> Part:
    """Attention's gradients, and what its kernel needs beside them.

    The reference holds the scores of a block of queries three times. torch's flash kernel adds up dq in float32 and
    writes dk and dv for every query head before it sums them over the heads that share a key head.
    """
    c, tokens = step.compute_bytes, step.tokens
    gradients = tokens * c * 2 * (base.query_size + base.kv_size)
    if step.attention_kernel == "flash" and step.on_gpu:
        return Part(ATTENTION_SPACE, gradients + tokens * base.query_size * (4 + 2 * c), "flash: no scores")
    gradients += tokens * 4 * 2 * base.kv_size
    if step.attention_kernel == "flash":
        return Part(ATTENTION_SPACE, gradients + step.longest_sample * c * (base.query_size + 2 * base.kv_size))
    queries, keys = score_block(base, step)
    scores = 4 * base.num_heads * queries * (2 * keys + max(0, keys - queries))
    return Part(ATTENTION_SPACE, gradients + scores, f"scores of {queries} queries x {keys:,} keys")


def score_block(base: BaseShape, step: StepShape) -> tuple[int, int]:
    """Queries and keys of the reference's largest block."""
    queries = min(QUERIES_PER_BLOCK, step.tokens)
    keys = step.longest_sample if base.full_layers else min(step.longest_sample, base.sliding_window + queries)
    return queries, keys


def loss_head(base: BaseShape, step: StepShape) -> Part:
    """Logits of a chunk of trained tokens in float32 and, below float32, their gradient in the compute dtype.

    On a CPU slices of the head's weight are widened for a product that a GPU can form from bfloat16.
    """
    c, trained = step.compute_bytes, step.tokens * step.trained_share
    tokens = min(HEAD_TOKENS, trained)
    narrow = c * tokens * base.vocab_size if c < 4 else 0.0
    widened = 4 * min(HEAD_SLICE, base.vocab_size) * (base.hidden + tokens) if c < 4 and not step.on_gpu else 0.0
    final_norm = step.tokens * base.hidden * (4 + c)
    picked = trained * base.hidden * (c + 4)
    chunk = 4 * tokens * base.vocab_size + max(narrow, widened)
    return Part(HEAD_CHUNK, chunk + final_norm + picked, f"{tokens:,.0f} tokens of {trained:,.0f}")


def layer_gradients(base: BaseShape, step: StepShape) -> float:
    """The gradient that comes into a layer, and those of its experts' factors before they are added up."""
    return step.tokens * base.hidden * step.compute_bytes + layer_gradient_bytes(base, step)

"""Peak memory of a training step, as a sum of named tensors.

Weights, adapter and optimiser states are allocated throughout; activations and gradients come and go. Not everything
exists at once: logits are freed before the experts' gradients are formed, and activations before the optimiser updates.
The peak is therefore the largest of a few moments, and the table lists what is allocated then.

Each factor in front of a size counts tensors of that size, as `tests/estimate/test_estimate_step.py` finds them
allocated in a real step. Letters are those of the kernels: T tokens, D hidden, F expert width, E experts, K active
ones, R = T·K routed tokens, Q and V widths of all query and of all key heads, H heads; c is the bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finetune.arch import MXFP4_BITS, Arch
from finetune.estimate.inputs import StepProfile

NF4_BITS = 4 + 32 / 64  # a float32 scale for each block of 64
EIGHT_BIT_STATE_BYTES = 2 * (1 + 4 / 256)  # two moments, a float32 scale for each block of 256
HEAD_TOKENS = 512  # finetune.kernels.loss_head.TOKENS_PER_CHUNK
HEAD_SLICE = 16_384  # words, finetune.kernels.loss_head
QUERIES_PER_BLOCK = 256  # finetune.kernels.attention.QUERIES_PER_BLOCK
PAD_ALIGNMENT = 32  # finetune.kernels.experts_triton.PAD_ALIGNMENT
INDEX_BYTES = 8
# Assumptions until a GPU has measured them (bench/README.md): the CUDA context with torch's and cuBLAS's own buffers,
# and what the caching allocator reserves beyond what is allocated, as a share of what comes and goes.
CONTEXT_BYTES = 0.75e9
SLACK_SHARE = 0.05
PROCESS_BYTES = 0.7e9

SHARDED_PARAMETERS = ("zero3", "fsdp2")
SHARDED_GRADIENTS = ("zero2", *SHARDED_PARAMETERS)
SHARDED_STATES = ("zero1", *SHARDED_GRADIENTS)

PACKED_EXPERTS = "packed experts"
ATTENTION = "attention, norms, router"
EMBEDDING = "input embedding"
HEAD = "output head"
GATHERED = "gathered layers"
FROZEN = (PACKED_EXPERTS, ATTENTION, EMBEDDING, HEAD, GATHERED)
LORA = "LoRA parameters"
GRADIENTS = "LoRA gradients"
STATES = "optimiser states"
CHECKPOINTS = "activation checkpoints"
ROUTER_LOGITS = "router logits, all layers"
LAYER = "activations of the current layer"
ALL_LAYERS = "activations of all layers"
SCRATCH = "expert scratch (a chunk)"
ROUTED_TOKENS = "routed tokens of experts"
ATTENTION_WORKSPACE = "attention workspace"
HEAD_CHUNK = "loss-head chunk"
CONTEXT = "CUDA context, libraries"
SLACK = "allocator slack"
PROCESS = "Python and torch"


@dataclass(frozen=True)
class NamedBytes:
    """Some bytes with a name; `detail` says what they consist of."""

    name: str
    num_bytes: float
    detail: str = ""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory on the device.

    Attributes:
        always: tensors that are allocated from start to end.
        moments: tensors allocated in addition at each moment that may be the peak.
    """

    always: tuple[NamedBytes, ...]
    moments: dict[str, tuple[NamedBytes, ...]]

    @property
    def peak_moment(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda name: _total(self.moments[name]))

    @property
    def total_bytes(self) -> float:
        """Bytes at the peak."""
        return _total(self.always) + _total(self.moments[self.peak_moment])

    @property
    def step_bytes(self) -> float:
        """Bytes of tensors at the peak, without context, slack and process: what a tracker of tensors measures."""
        overhead = (CONTEXT, SLACK, PROCESS)
        return sum(part.num_bytes for part in self.at_peak() if part.name not in overhead)

    def at_peak(self) -> list[NamedBytes]:
        """Everything allocated at the peak."""
        return [*self.always, *self.moments[self.peak_moment]]


def estimate_memory(arch: Arch, step: StepProfile) -> MemoryEstimate:
    """Estimate the peak of a step on the device of one rank.

    Args:
        arch: the model's dimensions.
        step: one micro-batch's computation.
    """
    always = [*base_parts(arch, step), *adapter_parts(arch, step)]
    overhead = NamedBytes(CONTEXT, CONTEXT_BYTES) if step.on_gpu else NamedBytes(PROCESS, PROCESS_BYTES)
    moments = {name: tuple(_with_slack(found, step)) for name, found in _moments(arch, step).items()}
    return MemoryEstimate((*always, overhead), moments)


def _moments(arch: Arch, step: StepProfile) -> dict[str, list[NamedBytes]]:
    """Tensors allocated at each moment in addition to those that always are.

    With one micro-batch a gradient appears when the checkpoint of its layer is freed, so only the larger of the two
    counts; from the second micro-batch on both exist.
    """
    kept, logits, grads = kept_activations(arch, step), router_logits(arch, step), gradients(arch, step)
    earlier = [grads] if step.accumulation_steps > 1 else []
    layer = layer_activations(arch, step) if step.checkpointing else 0.0
    attention = attention_activations(arch, step) if step.checkpointing else 0.0
    incoming = layer_gradients(arch, step)
    both = [kept, *earlier] if earlier or kept.num_bytes > grads.num_bytes else [grads]
    return {
        "loss head": [*earlier, kept, logits, loss_head(arch, step)],
        "backward of a layer's experts": [
            *both, logits, NamedBytes(LAYER, layer + incoming), *expert_backward(arch, step),
        ],
        "backward of a layer's attention": [
            *both, logits, NamedBytes(LAYER, attention + incoming), attention_backward(arch, step),
        ],
        "optimiser update": [grads, NamedBytes("optimiser workspace", update_bytes(arch, step))],
    }  # fmt: skip


def _with_slack(found: list[NamedBytes], step: StepProfile) -> list[NamedBytes]:
    return [*found, NamedBytes(SLACK, SLACK_SHARE * _total(found))] if step.on_gpu else found


def _total(found: Iterable[NamedBytes]) -> float:
    return sum(part.num_bytes for part in found)


# Weights, adapter and optimiser


def base_parts(arch: Arch, step: StepProfile) -> list[NamedBytes]:
    """The frozen base on the device, one rank's share; sharded layers are gathered into two whole buffers."""
    c, ranks = step.compute_bytes, step.world_size if step.kind in SHARDED_PARAMETERS else 1
    bits = {"mxfp4": MXFP4_BITS, "nf4": NF4_BITS}.get(step.expert_storage, 16)
    experts = arch.num_experts * (arch.expert_weights * bits / 8 + arch.expert_biases * c)
    wide = arch.attention_weights * (NF4_BITS / 8 if step.attention_storage == "nf4" else c)
    attention = wide + (arch.attention_vectors + arch.router_parameters) * c
    table = arch.vocab_size * arch.hidden * c
    stored = f"attention weights in {step.attention_storage}" if step.attention_storage != "compute" else ""
    parts = [
        NamedBytes(PACKED_EXPERTS, arch.num_layers * experts / ranks, f"{step.expert_storage}, with their biases"),
        NamedBytes(ATTENTION, arch.num_layers * attention / ranks + arch.hidden * c, stored),
        NamedBytes(EMBEDDING, 0 if step.embedding_on_cpu else table, "in host memory" if step.embedding_on_cpu else ""),
        NamedBytes(HEAD, table),
    ]
    return [*parts, NamedBytes(GATHERED, 2 * (experts + attention), "two whole layers")] if ranks > 1 else parts


def lora_parameters(arch: Arch, step: StepProfile) -> tuple[int, int]:
    """Trained parameters on attention (and the router), and on experts."""
    sizes = {
        "q_proj": arch.hidden + arch.query_size,
        "k_proj": arch.hidden + arch.kv_size,
        "v_proj": arch.hidden + arch.kv_size,
        "o_proj": arch.query_size + arch.hidden,
    }
    attention = step.attention_rank * sum(sizes[target] for target in step.attention_targets)
    attention += step.router_parameters
    on_experts = sum(_expert_parameters(arch, step, count) for count in step.adapted_experts)
    return step.adapted_layers * attention, on_experts


def _expert_parameters(arch: Arch, step: StepProfile, count: int) -> int:
    """Parameters of so many experts of a layer. gate_up reads D and writes 2 F, down reads F and writes D."""
    a, b = arch.hidden + arch.expert_width, 2 * arch.expert_width + arch.hidden
    a *= 1 if step.shared_factor == "a" else count
    b *= 1 if step.shared_factor == "b" else count
    return step.expert_rank * (a + b)


def adapter_parts(arch: Arch, step: StepProfile) -> list[NamedBytes]:
    """The adapter and its optimiser states on the device, one rank's share; for gradients see `gradients`."""
    count = sum(lora_parameters(arch, step))
    parameters: float = count
    if step.kind in SHARDED_PARAMETERS:  # two layers' factors are whole at a time
        parameters = count / step.world_size + 2 * count / max(1, step.adapted_layers)
    states = count / (step.world_size if step.kind in SHARDED_STATES else 1)
    on_device = not step.states_on_cpu and not step.optimizer.startswith("paged")
    state_total = states * state_bytes(step) if on_device else 0
    return [
        NamedBytes(LORA, parameters * step.adapter_bytes, f"{count:,} in {8 * step.adapter_bytes} bits"),
        NamedBytes(STATES, state_total, step.optimizer + ("" if on_device else " on CPU")),
    ]


def gradients(arch: Arch, step: StepProfile) -> NamedBytes:
    """Gradients of the whole adapter, one rank's share."""
    ranks = step.world_size if step.kind in SHARDED_GRADIENTS else 1
    return NamedBytes(GRADIENTS, sum(lora_parameters(arch, step)) * step.gradient_bytes / ranks)


def state_bytes(step: StepProfile) -> float:
    """Bytes of optimiser states per trained parameter."""
    return EIGHT_BIT_STATE_BYTES if "8bit" in step.optimizer else 2 * 4


def update_bytes(arch: Arch, step: StepProfile) -> float:
    """Temporary memory of an optimiser update.

    torch's AdamW on a GPU takes the square roots of all second moments at once; on a CPU, and in
    `finetune.train.optim.PerParameterOptimizer`, parameters are updated one by one: a float32 copy of parameter and
    gradient if they are narrower, the moments if they are in host memory, and two results.
    """
    count = sum(lora_parameters(arch, step))
    plain = step.optimizer == "adamw" and step.adapter_bytes == 4 and not step.states_on_cpu
    if plain and step.on_gpu:
        return 4 * count / (step.world_size if step.kind in SHARDED_STATES else 1)
    experts = max(step.adapted_experts, default=0) * step.expert_rank * 2 * arch.expert_width
    largest = max(experts, step.attention_rank * max(arch.query_size, arch.hidden))
    widened = sum(4 for width in (step.adapter_bytes, step.gradient_bytes) if width < 4)
    fetched = state_bytes(step) if step.states_on_cpu and step.on_gpu else 0
    return largest * (widened + fetched + 2 * 4)


# Activations and gradients


def kept_activations(arch: Arch, step: StepProfile) -> NamedBytes:
    """Activations kept between forward and backward pass: each layer's input, or everything in it."""
    if not step.checkpointing:
        return NamedBytes(ALL_LAYERS, arch.num_layers * layer_activations(arch, step), "nothing is recomputed")
    kept = arch.num_layers * step.tokens * arch.hidden * step.compute_bytes
    detail = f"{arch.num_layers} layers x {step.tokens:,} tokens x {arch.hidden:,}"
    return NamedBytes(CHECKPOINTS, 0 if step.offload else kept, detail + (", on CPU" if step.offload else ""))


def layer_activations(arch: Arch, step: StepProfile) -> float:
    """Bytes that one layer's own graph keeps between its forward and its backward."""
    return attention_activations(arch, step) + expert_inputs(arch, step)


def attention_activations(arch: Arch, step: StepProfile) -> float:
    """Attention half: normed input, q, output and o_proj's input, k and v, log-sums; the norm's own copy."""
    c, targets = step.compute_bytes, step.attention_targets if step.attention_rank else ()
    # A projection's input is kept for its LoRA-A alone: the frozen weight needs none. o_proj's is a copy of the
    # attention's output only in batches of one sequence, where queries are read through transposed strides.
    copied = "o_proj" in targets and step.sequences == 1
    inputs = arch.hidden * bool({"q_proj", "k_proj", "v_proj"} & set(targets)) + arch.query_size * copied
    kept = c * (inputs + 2 * arch.query_size + 2 * arch.kv_size) + 4 * arch.num_heads
    return step.tokens * (kept + norm_copy(arch, step))


def expert_inputs(arch: Arch, step: StepProfile) -> float:
    """Expert half: the normed input and the norm's own copy, router weights, ids and the routed tokens' order."""
    c = step.compute_bytes
    dispatch = arch.num_active_experts * (c + 2 * INDEX_BYTES)
    return step.tokens * (arch.hidden * c + norm_copy(arch, step) + dispatch)


def norm_copy(arch: Arch, step: StepProfile) -> float:
    """Bytes that a norm keeps of a token beside its input and output: a float32 copy; on a GPU one number."""
    return 4 if step.on_gpu else 4 * arch.hidden


def router_logits(arch: Arch, step: StepProfile) -> NamedBytes:
    """Router logits of every layer, and their float32 softmax in the balance loss's graph."""
    per_token = arch.num_experts * (step.compute_bytes + 4)
    return NamedBytes(ROUTER_LOGITS, arch.num_layers * step.tokens * per_token)


def expert_backward(arch: Arch, step: StepProfile) -> list[NamedBytes]:
    """The expert block's backward at its busiest chunk: routed tokens are gathered, recomputed and scattered back.

    The reference replays a chunk under autograd. The Triton block keeps rows [x | LoRA | 1], gate_up's product, two
    gradients, the activation and its update's gradient, and weights that carry LoRA-B and bias in extra columns.
    """
    c, routed = step.compute_bytes, step.tokens * arch.num_active_experts
    chunk = step.experts_per_chunk
    busiest = min(routed, routed * chunk / arch.num_experts * step.busiest_chunk)
    hidden, width = arch.hidden, arch.expert_width
    if step.expert_kernel == "triton":
        pad = -(-(step.highest_rank + 1) // PAD_ALIGNMENT) * PAD_ALIGNMENT
        weights = chunk * (2 * width * (hidden + pad) + hidden * (width + pad))
        per_token = 2 * hidden + 5 * width + 2 * pad
        adapted = max(step.adapted_experts, default=0)
        narrow = adapted * step.expert_rank * (hidden + width) if step.adapter_bytes > c else 0
    else:
        weights, narrow = chunk * arch.expert_weights, 0
        per_token = 7 * width + (6 if step.expert_rank else 5) * hidden
    gathered = routed * hidden  # the gradient of every routed token, until all chunks are done
    detail = f"{busiest:,.0f} of {routed:,} in the busiest chunk"
    return [
        NamedBytes(SCRATCH, c * (weights + narrow), f"{chunk} experts in {8 * c} bits"),
        NamedBytes(ROUTED_TOKENS, c * (gathered + busiest * per_token), detail),
    ]


def attention_backward(arch: Arch, step: StepProfile) -> NamedBytes:
    """Attention's gradients, and its kernel's workspace.

    The reference keeps the scores of a block of queries three times. torch's flash kernel adds up dq in float32 and
    writes dk and dv for every query head before it sums them over the heads that share a key head.
    """
    c, tokens = step.compute_bytes, step.tokens
    grads = tokens * c * 2 * (arch.query_size + arch.kv_size)
    if step.attention_kernel == "flash" and step.on_gpu:
        return NamedBytes(ATTENTION_WORKSPACE, grads + tokens * arch.query_size * (4 + 2 * c), "flash: no scores")
    grads += tokens * 4 * 2 * arch.kv_size
    if step.attention_kernel == "flash":
        gathered = step.longest_example * c * (arch.query_size + 2 * arch.kv_size)
        return NamedBytes(ATTENTION_WORKSPACE, grads + gathered)
    queries, keys = score_block(arch, step)
    scores = 4 * arch.num_heads * queries * (2 * keys + max(0, keys - queries))
    return NamedBytes(ATTENTION_WORKSPACE, grads + scores, f"scores of {queries} queries x {keys:,} keys")


def score_block(arch: Arch, step: StepProfile) -> tuple[int, int]:
    """Queries and keys of the reference's largest block."""
    queries = min(QUERIES_PER_BLOCK, step.tokens)
    window = arch.sliding_window + queries
    return queries, step.longest_example if arch.full_layers else min(step.longest_example, window)


def loss_head(arch: Arch, step: StepProfile) -> NamedBytes:
    """Logits of a chunk of trained tokens in float32 and, below float32, their gradient in the compute dtype.

    On a CPU slices of the head's weight are widened for a product that a GPU can form from bfloat16.
    """
    c, trained = step.compute_bytes, step.tokens * step.trained_share
    tokens = min(HEAD_TOKENS, trained)
    narrow = c * tokens * arch.vocab_size if c < 4 else 0.0
    widened = 4 * min(HEAD_SLICE, arch.vocab_size) * (arch.hidden + tokens) if c < 4 and not step.on_gpu else 0.0
    final_norm = step.tokens * (arch.hidden * c + norm_copy(arch, step))
    picked = trained * arch.hidden * (c + 4)
    chunk = 4 * tokens * arch.vocab_size + max(narrow, widened)
    return NamedBytes(HEAD_CHUNK, chunk + final_norm + picked, f"{tokens:,.0f} tokens of {trained:,.0f}")


def layer_gradients(arch: Arch, step: StepProfile) -> float:
    """The gradient that arrives at a layer, and those of its experts' factors before they are accumulated."""
    factors = _expert_parameters(arch, step, max(step.adapted_experts, default=0)) * step.adapter_bytes
    return step.tokens * arch.hidden * step.compute_bytes + factors

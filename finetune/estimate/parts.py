"""What a run holds from start to end, part by part: the base's weights, the adapter, the optimiser's states."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.estimate.inputs import StepShape
from finetune.estimate.shapes import MXFP4_BITS, BaseShape

NF4_BITS = 4 + 32 / 64  # a float32 scale for each block of 64
EIGHT_BIT_STATE_BYTES = 2 * (1 + 4 / 256)  # two moments, a float32 scale for each block of 256
SHARDED_PARAMETERS = ("zero3", "fsdp2")
SHARDED_GRADIENTS = ("zero2", *SHARDED_PARAMETERS)
SHARDED_STATES = ("zero1", *SHARDED_GRADIENTS)

PACKED_EXPERTS = "packed experts"
ATTENTION = "attention, norms, router"
EMBEDDING = "input embedding"
HEAD = "output head"
GATHERED = "gathered layers"
LORA = "LoRA parameters"
GRADIENTS = "LoRA gradients"
STATES = "optimiser states"


@dataclass(frozen=True)
class Part:
    """Some bytes with a name; `detail` says what they are made of."""

    name: str
    num_bytes: float
    detail: str = ""


def base_parts(base: BaseShape, step: StepShape) -> list[Part]:
    """The frozen base on the device, one process's share; dealt-out layers are gathered into two whole buffers."""
    c, split = step.compute_bytes, step.processes if step.kind in SHARDED_PARAMETERS else 1
    bits = {"mxfp4": MXFP4_BITS, "nf4": NF4_BITS}.get(step.expert_storage, 16)
    experts = base.num_experts * (base.expert_weights * bits / 8 + base.expert_biases * c)
    wide = base.attention_weights * (NF4_BITS / 8 if step.attention_storage == "nf4" else c)
    attention = wide + (base.attention_vectors + base.router) * c
    table = base.vocab_size * base.hidden * c
    parts = [
        Part(PACKED_EXPERTS, base.num_layers * experts / split, f"{step.expert_storage}, with their biases"),
        Part(ATTENTION, base.num_layers * attention / split + base.hidden * c, _held_as(step.attention_storage)),
        Part(EMBEDDING, 0 if step.embedding_on_cpu else table, "in host memory" if step.embedding_on_cpu else ""),
        Part(HEAD, table),
    ]
    return [*parts, Part(GATHERED, 2 * (experts + attention), "two layers whole")] if split > 1 else parts


def _held_as(storage: str) -> str:
    return f"attention weights in {storage}" if storage != "compute" else ""


def lora_parameters(base: BaseShape, step: StepShape) -> tuple[int, int]:
    """Trained parameters on attention (and the router), and on experts."""
    sizes = {
        "q_proj": base.hidden + base.query_size,
        "k_proj": base.hidden + base.kv_size,
        "v_proj": base.hidden + base.kv_size,
        "o_proj": base.query_size + base.hidden,
    }
    attention = step.attention_rank * sum(sizes[target] for target in step.attention_targets)
    attention += step.router_parameters
    on_experts = sum(_of_experts(base, step, count) for count in step.adapted_experts)
    return step.adapted_layers * attention, on_experts


def _of_experts(base: BaseShape, step: StepShape, count: int) -> int:
    """Parameters on so many experts of a layer. gate_up reads D and writes 2 F, down reads F and writes D."""
    a, b = base.hidden + base.expert_width, 2 * base.expert_width + base.hidden
    a *= 1 if step.shared_factor == "a" else count
    b *= 1 if step.shared_factor == "b" else count
    return step.expert_rank * (a + b)


def adapter_parts(base: BaseShape, step: StepShape) -> list[Part]:
    """The adapter and its optimiser on the device, one process's share; gradients come and go (`gradients`)."""
    count = sum(lora_parameters(base, step))
    parameters: float = count
    if step.kind in SHARDED_PARAMETERS:  # two layers' factors are whole at a time
        parameters = count / step.processes + 2 * count / max(1, step.adapted_layers)
    states = count / (step.processes if step.kind in SHARDED_STATES else 1)
    on_device = not step.states_on_cpu and not step.optimizer.startswith("paged")
    return [
        Part(LORA, parameters * step.adapter_bytes, f"{count:,} in {8 * step.adapter_bytes} bits"),
        Part(STATES, states * state_bytes(step) if on_device else 0, step.optimizer + ("" if on_device else " on CPU")),
    ]


def gradients(base: BaseShape, step: StepShape) -> Part:
    """Gradients of the whole adapter, one process's share."""
    split = step.processes if step.kind in SHARDED_GRADIENTS else 1
    return Part(GRADIENTS, sum(lora_parameters(base, step)) * step.gradient_bytes / split)


def state_bytes(step: StepShape) -> float:
    """Bytes of optimiser states for each trained parameter."""
    return EIGHT_BIT_STATE_BYTES if "8bit" in step.optimizer else 2 * 4


def update_bytes(base: BaseShape, step: StepShape) -> float:
    """What an update makes and drops.

    torch's AdamW on a GPU takes the square roots of all second moments at once; on a CPU, and in
    `finetune.train.optim.PerParameterOptimizer`, parameters come one by one: a float32 copy of parameter and gradient
    if they are narrower, the moments if they live in host memory, and two results.
    """
    count = sum(lora_parameters(base, step))
    plain = step.optimizer == "adamw" and step.adapter_bytes == 4 and not step.states_on_cpu
    if plain and step.on_gpu:
        return 4 * count / (step.processes if step.kind in SHARDED_STATES else 1)
    experts = max(step.adapted_experts, default=0) * step.expert_rank * 2 * base.expert_width
    largest = max(experts, step.attention_rank * max(base.query_size, base.hidden))
    widened = sum(4 for width in (step.adapter_bytes, step.gradient_bytes) if width < 4)
    fetched = state_bytes(step) if step.states_on_cpu and step.on_gpu else 0
    return largest * (widened + fetched + 2 * 4)


def layer_gradient_bytes(base: BaseShape, step: StepShape) -> float:
    """Gradients of one layer's experts, which are whole before they are added to the others."""
    return _of_experts(base, step, max(step.adapted_experts, default=0)) * step.adapter_bytes

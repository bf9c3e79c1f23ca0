"""Peak memory of a training step: the moments at which it may be reached, each a sum of named parts.

Not everything is alive at once: logits are gone when the experts' gradients are formed, and activations are gone when
the optimiser updates. So the peak is the largest of a few moments, and the table says what is alive then.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.estimate import activations as act
from finetune.estimate import parts as held
from finetune.estimate.inputs import StepShape
from finetune.estimate.parts import Part
from finetune.estimate.shapes import BaseShape

# Assumptions until a GPU has measured them (bench/README.md): the CUDA context with torch's and cuBLAS's own buffers,
# and what the caching allocator holds beyond what is alive, as a share of what comes and goes.
CONTEXT_BYTES = 0.75e9
SLACK_SHARE = 0.05
CONTEXT = "CUDA context, libraries"
SLACK = "allocator slack"
PROCESS = "Python and torch"
PROCESS_BYTES = 0.7e9


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory on the device.

    Attributes:
        always: parts that are there from start to end.
        moments: parts alive beside them, at each moment that may be the peak.
    """

    always: tuple[Part, ...]
    moments: dict[str, tuple[Part, ...]]

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
        """Bytes of tensors at the peak, without context, slack and process: what a tracker of tensors sees."""
        overhead = (CONTEXT, SLACK, PROCESS)
        return sum(part.num_bytes for part in self.at_peak() if part.name not in overhead)

    def at_peak(self) -> list[Part]:
        """Every part alive at the peak."""
        return [*self.always, *self.moments[self.peak_moment]]


def estimate_memory(base: BaseShape, step: StepShape) -> MemoryEstimate:
    """Estimate the peak of a step on one device of one process.

    Args:
        base: the model's sizes.
        step: what a micro-step computes.
    """
    always = [*held.base_parts(base, step), *held.adapter_parts(base, step)]
    overhead = Part(CONTEXT, CONTEXT_BYTES) if step.on_gpu else Part(PROCESS, PROCESS_BYTES)
    moments = {name: tuple(_with_slack(found, step)) for name, found in _moments(base, step).items()}
    return MemoryEstimate((*always, overhead), moments)


def _moments(base: BaseShape, step: StepShape) -> dict[str, list[Part]]:
    """What is alive at each moment beside what always is.

    With one micro-step a gradient appears when the checkpoint of its layer is dropped, so only the larger of the two
    is there at a time; from the second micro-step on both are.
    """
    kept, tape, gradients = act.kept_activations(base, step), act.routing_tape(base, step), held.gradients(base, step)
    earlier = [gradients] if step.gradient_accumulation_steps > 1 else []
    layer = act.layer_activations(base, step) if step.checkpointing else 0.0
    attention = act.attention_activations(base, step) if step.checkpointing else 0.0
    incoming = act.layer_gradients(base, step)
    both = [kept, *earlier] if earlier or kept.num_bytes > gradients.num_bytes else [gradients]
    return {
        "loss head": [*earlier, kept, tape, act.loss_head(base, step)],
        "backward of a layer's experts": [
            *both, tape, Part(act.LAYER, layer + incoming), *act.expert_backward(base, step),
        ],
        "backward of a layer's attention": [
            *both, tape, Part(act.LAYER, attention + incoming), act.attention_backward(base, step),
        ],
        "optimiser update": [gradients, Part("optimiser workspace", held.update_bytes(base, step))],
    }  # fmt: skip


def _with_slack(found: list[Part], step: StepShape) -> list[Part]:
    return [*found, Part(SLACK, SLACK_SHARE * _total(found))] if step.on_gpu else found


def _total(found: tuple[Part, ...] | list[Part]) -> float:
    return sum(part.num_bytes for part in found)

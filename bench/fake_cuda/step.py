"""The optimiser step of a recipe at full widths on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import Accelerator
from random_base import config_of, packed_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

import finetune.adapters.attach as attach
import finetune.model.forward as forward
import finetune.objectives.router as router
import finetune.objectives.sft as sft
from fake_cuda.counts import Call, Counting, Counts, stub_triton
from finetune.adapters.lora import Adapter
from finetune.adapters.sites import Selection, plan_sites
from finetune.arch import Arch
from finetune.config.schema import RunConfig
from finetune.data.batches import Batch
from finetune.kernels import experts_fused, experts_triton, rotary_triton
from finetune.kernels.dispatch import Dispatch
from finetune.model.attention import register_attention
from finetune.model.build import DTYPES, Base
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import PackedExperts, expert_block_of
from finetune.model.forward import checkpoint_activations
from finetune.model.storage import BaseStorage, CpuEmbedding
from finetune.train.engines.base import Replicated
from finetune.train.optim import make_optimizer
from finetune.train.step import OptimiserStep
from finetune.train.world import SINGLE_PROCESS

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Work:
    """What one optimiser step computes.

    Attributes:
        shape: `20b`, `120b` or a smaller one of `random_base.SHAPES`.
        config: the recipe.
        sequences: of a micro-batch; `length` tokens each, in examples of `example` tokens.
        trained_share: share of an example's tokens that are trained, its last ones.
        micro_batches: of the step.
        layers: fewer layers than the shape has. None: all.
        adapted: experts of each layer that have LoRA. None: all.
    """

    shape: str
    config: RunConfig
    sequences: int
    length: int
    example: int
    trained_share: float
    micro_batches: int
    layers: int | None = None
    adapted: int | None = None

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length * self.micro_batches

    def attention_flops(self, heads: int, width: int, window: int | None) -> float:
        """Floating-point operations of one forward attention over a micro-batch."""
        seen = (self.example + 1) / 2
        if window is not None and window < self.example:
            seen = window - window * (window - 1) / (2 * self.example)
        return 4.0 * self.sequences * self.length * seen * heads * width

    def model_config(self) -> dict[str, Any]:
        """config.json's content."""
        config = config_of(self.shape)
        if self.layers is None:
            return config
        kinds = (config["layer_types"] * self.layers)[: self.layers]
        return {**config, "num_hidden_layers": self.layers, "layer_types": kinds}


def count_step(work: Work) -> Counts:
    """Count the second step of a run. torch must answer as in `fake_cuda.device.one_gpu`."""
    counts = Counts()
    experts_fused._SCRATCH.clear()  # of an earlier step
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    batches = [_batch(work)] * work.micro_batches
    with fake, _on_the_host(), _cuda_norms(counts), even_routing(counts):
        base = fake_base(work)
        adapter = _fake_adapter(base, work)
        base.model.config._attn_implementation = register_attention("flash")
        if work.config.trainer.activation_checkpointing:
            checkpoint_activations(base.model)
        counts.track([*base.model.parameters(), *base.model.buffers()], "the frozen base and the adapter")
        step = _step(base, adapter, work, counts)
        with stub_triton([experts_triton, rotary_triton], counts), Counting(counts, work.attention_flops):
            step(batches, 1e-4, 1)
            counts.forget_costs()  # the second step has the optimiser's states in memory, as all later ones
            step(batches, 1e-4, 2)
    return counts


def _batch(work: Work) -> Batch:
    index = torch.arange(work.length).expand(work.sequences, work.length)
    positions, segments = index % work.example, index // work.example
    first_trained = max(1, round(work.example * (1 - work.trained_share)))
    ids = torch.randint(2, 200_000, index.shape, generator=torch.Generator().manual_seed(0))
    weights = (positions >= first_trained).float()
    return Batch(ids, weights, positions, segments, tuple(("example",) for _ in range(work.sequences)))


def fake_base(work: Work) -> Base:
    """The frozen base, its tensors without values."""
    config = work.model_config()
    model_config = work.config.model
    arch = Arch.from_config(config, "config.json")
    with unset_fake_temporarily(), _disable_current_modes():
        model = packed_model(config, arch, model_config.experts_per_chunk, model_config.expert_storage)
        rotary = GptOssRotaryEmbedding(model.config)
    dtype = torch.bfloat16
    if model_config.embedding_on_cpu:
        model.model.embed_tokens = CpuEmbedding(model.model.embed_tokens, DEVICE, dtype)

    def filled(name: str, tensor: Tensor) -> Tensor:
        on_host = model_config.embedding_on_cpu and "embed_tokens" in name
        stored = tensor.dtype if tensor.dtype == torch.uint8 or name.endswith("nf4_scales") else dtype
        return torch.empty(tensor.shape, dtype=stored, device="cpu" if on_host else DEVICE)

    state = {name: filled(name, tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    for name, buffer in list(rotary._buffers.items()):
        rotary._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
    model.model.rotary_emb = rotary
    model.requires_grad_(False).eval()
    for layer in model.model.layers:
        layer.self_attn.fused_rotary = True
    block = expert_block_of("triton")
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.kernel, module.block = "triton", block
    checkpoint = cast(Checkpoint, SimpleNamespace(arch=arch, config=config))
    storage = BaseStorage(experts=model_config.expert_storage, embedding_on_cpu=model_config.embedding_on_cpu)
    return Base(model, checkpoint, "fake", {}, storage)


def _fake_adapter(base: Base, work: Work) -> Adapter:
    arch = base.checkpoint.arch
    selection: Selection | None = None
    if work.adapted is not None:
        stride = arch.num_experts // work.adapted
        selection = {layer: tuple(range(0, arch.num_experts, stride)) for layer in range(arch.num_layers)}
    adapter_config = work.config.adapter
    sites = plan_sites(arch, adapter_config, selection, None)
    return attach._attach_sites(base.model, sites, DTYPES[adapter_config.dtype], adapter_config.attention.dropout)


class _OneProcess:
    """What `Replicated` asks of Accelerate, and the phase of the step for the counts."""

    num_processes = 1

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def backward(self, loss: Tensor) -> None:
        self.counts.phase = "backward"
        loss.backward()
        self.counts.phase = "forward"

    def reduce(self, tensor: Tensor, _how: str) -> Tensor:
        return tensor

    def clip_grad_norm_(self, parameters: Any, largest: float) -> Tensor:
        self.counts.phase = "update"
        return torch.nn.utils.clip_grad_norm_(list(parameters), largest)


def _step(base: Base, adapter: Adapter, work: Work, counts: Counts) -> OptimiserStep:
    trainer, parameters = work.config.trainer, adapter.parameters()
    accelerator = cast(Accelerator, _OneProcess(counts))
    engine = Replicated(parameters, make_optimizer(parameters, trainer), trainer, accelerator, SINGLE_PROCESS)
    return OptimiserStep(trainer, base, engine, adapter)


# What a CPU build of torch does otherwise


class _CudaRmsNorm(torch.autograd.Function):
    """Stands for the CUDA build's fused kernel, which a CPU build replaces by seven operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Counts) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(x, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))
        return _CudaRmsNorm._launch(counts, x, 2)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _CudaRmsNorm._launch(ctx.counts, grad_out, 3), None

    @staticmethod
    def _launch(counts: Counts, like: Tensor, passes: int) -> Tensor:
        num_bytes = passes * like.numel() * like.element_size()
        counts.costs[Call(counts.phase, "autograd", "fused_rms_norm")].add(1, num_bytes)
        return torch.empty_like(like)


@contextmanager
def _cuda_norms(counts: Counts) -> Iterator[None]:
    before = torch.nn.functional.rms_norm
    torch.nn.functional.rms_norm = lambda x, *_: _CudaRmsNorm.apply(x, counts)
    try:
        yield
    finally:
        torch.nn.functional.rms_norm = before


# What needs real values


@contextmanager
def _on_the_host() -> Iterator[None]:
    """Let the functions that plan on the host see real tensors: they need values."""
    places = [(forward, "plan_attention"), (sft, "shift_labels"), (router, "real_tokens")]
    before = [getattr(module, name) for module, name in places]

    def real(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily(), _disable_current_modes():
                return function(*args, **kwargs)

        return call

    for (module, name), function in zip(places, before, strict=True):
        setattr(module, name, real(function))
    try:
        yield
    finally:
        for (module, name), function in zip(places, before, strict=True):
            setattr(module, name, function)


@contextmanager
def even_routing(counts: Counts) -> Iterator[None]:
    """Let every expert get equally many tokens: fake ids have no values to count. The wait is counted as in a run."""
    before = Dispatch.__dict__["of"]

    def of(cls: type[Dispatch], expert_ids: Tensor, num_experts: int, experts_per_chunk: int) -> Dispatch:
        ids, order = expert_ids.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(ids, torch.arange(num_experts, device=ids.device), right=True)
        per_expert = ends.diff(prepend=ends.new_zeros(1))
        missing = -num_experts % experts_per_chunk
        by_chunk = torch.nn.functional.pad(per_expert, (0, missing)).view(-1, experts_per_chunk)
        offsets = by_chunk.cumsum(1).reshape(-1)[:num_experts].to(torch.int32)
        counts.waits["kernels/dispatch.py of"] += 1
        each, left = divmod(expert_ids.numel(), num_experts)
        even = [each + (number < left) for number in range(num_experts)]
        return cls(order, even, offsets, ends, experts_per_chunk, expert_ids.shape[1])

    Dispatch.of = classmethod(of)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Dispatch.of = before  # type: ignore[method-assign]

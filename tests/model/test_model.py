"""The packed model against transformers on the dequantised weights: logits, gradients, packing, storage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import gradient_sum_noise, relatively_apart
from transformers import AutoModelForCausalLM, GptOssForCausalLM, Mxfp4Config

from finetune.errors import CheckError
from finetune.model.attention import attention_kernel, select_attention_kernel
from finetune.model.build import Base, build_base, check_unchanged
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import (
    check_packing,
    checkpoint_activations,
    hidden_states,
    logits,
    packing_leakage,
    record_router,
)
from finetune.model.noise import rounding_noise
from finetune.model.storage import check_expert_storage, storage_table


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return build_base(Checkpoint.open(tiny_base), torch.device("cpu"), torch.float32, experts_per_chunk=3)


@pytest.fixture(scope="module")
def reference(tiny_base: Path) -> GptOssForCausalLM:
    """transformers' own model and attention on the dequantised weights, float32."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base,
        dtype=torch.bfloat16,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
    )
    return model.float().eval()


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(199_998, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["reference", "flash"])
def kernel(request: pytest.FixtureRequest, base: Base) -> Iterator[str]:
    """Attention on this kernel while the test runs."""
    select_attention_kernel(base.model, request.param)
    yield request.param
    select_attention_kernel(base.model, "reference")


@torch.no_grad()
def test_logits_equal_transformers(base: Base, reference: GptOssForCausalLM, kernel: str) -> None:
    assert attention_kernel(base.model) == kernel
    tokens = ids(300)
    ours, theirs = logits(base.model, tokens), reference(input_ids=tokens[None]).logits[0]
    assert theirs.std() > 0.1, "a model that says nothing would agree with anything"
    assert (ours - theirs).abs().max() <= rounding_noise(base.model, lambda: logits(base.model, tokens)) < 1e-2


@torch.no_grad()
def test_logits_equal_transformers_past_position_4096(base: Base, reference: GptOssForCausalLM) -> None:
    """YaRN's frequencies are not in the checkpoint; garbage ones would show here."""
    tokens = ids(200)
    positions = torch.arange(9000, 9200)[None]
    hidden = hidden_states(base.model, tokens[None], positions, torch.zeros_like(positions))
    theirs = reference.model(input_ids=tokens[None], position_ids=positions).last_hidden_state
    limit = rounding_noise(reference, lambda: reference(input_ids=tokens[None], position_ids=positions).logits)
    assert (base.model.lm_head(hidden) - reference.lm_head(theirs)).abs().max() <= limit
    assert limit < 1e-2
    near = hidden_states(base.model, tokens[None], positions - 9000, torch.zeros_like(positions))
    assert (hidden - near).abs().max() > 1e-6, "rotary positions reach the model"


@torch.no_grad()
def test_a_whole_long_sequence_equals_transformers(base: Base, reference: GptOssForCausalLM) -> None:
    tokens = ids(4200)
    positions = torch.arange(4200)[None]
    ours = hidden_states(base.model, tokens[None], positions, torch.zeros_like(positions))[0, -8:]
    theirs = reference.model(input_ids=tokens[None]).last_hidden_state[0, -8:]

    def computed() -> torch.Tensor:
        states = hidden_states(base.model, tokens[None], positions, torch.zeros_like(positions))[0, -8:]
        return base.model.lm_head(states)

    limit = rounding_noise(base.model, computed)
    assert (base.model.lm_head(ours) - reference.lm_head(theirs)).abs().max() <= limit
    assert limit < 1e-2


def test_gradient_through_the_whole_model_equals_transformers(
    base: Base, reference: GptOssForCausalLM, kernel: str
) -> None:
    """d loss / d input embeddings passes every layer: attention with sinks, router weights and packed experts."""
    tokens = ids(160, seed=3)
    positions = torch.arange(len(tokens))[None]

    def gradient(model: GptOssForCausalLM, targets: torch.Tensor) -> torch.Tensor:
        embedded = model.model.embed_tokens(tokens[None]).detach().requires_grad_()
        handle = model.model.embed_tokens.register_forward_hook(lambda *_: embedded)
        if model is base.model:
            hidden = hidden_states(model, tokens[None], positions, torch.zeros_like(positions))
        else:
            hidden = model.model(input_ids=tokens[None]).last_hidden_state
        handle.remove()
        nll = torch.nn.functional.cross_entropy(model.lm_head(hidden[0, :-1]), targets)
        return torch.autograd.grad(nll, embedded)[0]

    ours, theirs = gradient(base.model, tokens[1:]), gradient(reference, tokens[1:])
    assert theirs.abs().max() > 0
    noise = rounding_noise(reference, lambda: gradient(reference, tokens[1:]), relatively_apart, reference=theirs)
    noise += gradient_sum_noise(reference, len(tokens))
    assert relatively_apart(ours, theirs) <= noise < 1e-3
    assert (ours - theirs).mean().abs() < noise / ours.numel() ** 0.5 * theirs.abs().max(), "drifts to one side"
    other = tokens[1:].clone()
    other[80] = tokens[0]
    assert relatively_apart(gradient(base.model, other), theirs) > 100 * noise, "one wrong target would show"


def test_packed_examples_are_separate_and_the_check_can_fail(base: Base, kernel: str) -> None:
    assert check_packing(base.model) < 1e-5
    assert packing_leakage(base.model, join=True) > 0.1


@torch.no_grad()
def test_answers_attend_to_a_shared_prompt_with_either_kernel(base: Base, kernel: str) -> None:
    """One prompt longer than the window and two answers side by side, against prompt and answer alone."""
    prompt, answers = ids(150), (ids(9, seed=1), ids(5, seed=2))
    segments = torch.repeat_interleave(torch.tensor([150, 9, 5]))[None]
    positions = torch.cat([torch.arange(150), torch.arange(150, 159), torch.arange(150, 155)])[None]
    together = hidden_states(
        base.model, torch.cat([prompt, *answers])[None], positions, segments, torch.zeros_like(segments)
    )[0]
    for answer, mine in zip(answers, together[150:].split([9, 5]), strict=True):
        alone = torch.cat([prompt, answer])[None]
        place = torch.arange(alone.shape[1])[None]
        by_itself = partial(hidden_states, base.model, alone, place, torch.zeros_like(place))
        assert (by_itself()[0, 150:] - mine).abs().max() <= rounding_noise(base.model, by_itself) < 1e-2


def test_a_leaking_model_is_refused(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("finetune.model.forward.packing_leakage", lambda _model, **_how: 0.5)
    with pytest.raises(CheckError, match="packed examples are not separate"):
        check_packing(base.model)


def test_calling_transformers_forward_directly_is_refused(base: Base) -> None:
    with pytest.raises(ValueError, match=r"finetune\.model\.forward"):
        base.model(input_ids=ids(4)[None])


def test_experts_stay_packed_as_on_disk(base: Base, tiny_base: Path) -> None:
    table = storage_table(base.model)
    check_expert_storage(table, "mxfp4")
    stored = {k: v for f in tiny_base.glob("*.safetensors") for k, v in load_file(f).items()}
    state = base.model.state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name].to(tensor.dtype), tensor), name
    packed = sum(t.numel() for n, t in stored.items() if n.endswith(("_blocks", "_scales")))
    assert next(line.num_bytes for line in table if line.part == "expert weights") == packed


def test_dense_experts_are_refused(tiny_base: Path) -> None:
    base = build_base(Checkpoint.open(tiny_base), torch.device("cpu"), torch.float32, 4)
    experts = base.model.model.layers[0].mlp.experts
    experts.gate_up_proj_blocks = experts.gate_up_proj_blocks.float()
    with pytest.raises(CheckError, match="float32"):
        check_expert_storage(storage_table(base.model), "mxfp4")


def test_identity_is_that_of_the_files_and_a_changed_base_is_named(tiny_base: Path) -> None:
    from finetune.model.identity import checkpoint_identity

    checkpoint = Checkpoint.open(tiny_base)
    base = build_base(checkpoint, torch.device("cpu"), torch.float32, 4)
    assert base.identity == checkpoint_identity(checkpoint)
    assert check_unchanged(base) == base.identity
    with torch.no_grad():
        base.model.model.layers[1].mlp.router.bias[3] += 0.5
    with pytest.raises(CheckError, match=r"layers\.1\.mlp\.router\.bias"):
        check_unchanged(base)


def test_a_model_with_equal_widths_equals_transformers(tiny_base: Path, tmp_path: Path) -> None:
    """hidden = expert width, as in the published models, where no shape would tell a transposed down_proj."""
    from finetune.mxfp4.format import quantise

    directory = tmp_path / "square"
    directory.mkdir()
    config = json.loads((tiny_base / "config.json").read_text())
    config["intermediate_size"] = config["hidden_size"]
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {k: v for f in tiny_base.glob("*.safetensors") for k, v in load_file(f).items()}
    g = torch.Generator().manual_seed(5)
    size, experts = config["hidden_size"], config["num_local_experts"]
    for layer in range(config["num_hidden_layers"]):
        for name, out in (("gate_up_proj", 2 * size), ("down_proj", size)):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            blocks, scales = quantise(torch.randn(experts, out, size, generator=g) * 0.1)
            tensors |= {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales}
            tensors[f"{prefix}_bias"] = (torch.randn(experts, out, generator=g) * 0.1).bfloat16()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(tiny_base / "generation_config.json", directory)
    base = build_base(Checkpoint.open(directory), torch.device("cpu"), torch.float32, 3)
    reference = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    ).float()
    with torch.no_grad():
        tokens = ids(150)
        theirs = reference(input_ids=tokens[None]).logits[0]
        limit = rounding_noise(base.model, lambda: logits(base.model, tokens))
        assert (logits(base.model, tokens) - theirs).abs().max() <= limit
        experts_module = base.model.model.layers[0].mlp.experts
        blocks = experts_module.down_proj_blocks
        experts_module.down_proj_blocks = blocks.flip(1)
        assert (logits(base.model, tokens) - theirs).abs().max() > 100 * limit, "a permuted down_proj would be seen"


def test_router_outputs_are_recorded_once_when_layers_are_recomputed(base: Base) -> None:
    tokens = ids(20)
    positions = torch.arange(20)[None]
    checkpoint_activations(base.model)
    base.model.train()
    embed = base.model.model.embed_tokens
    handle = embed.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_())
    with record_router(base.model) as tape:
        hidden = hidden_states(base.model, tokens[None], positions, torch.zeros_like(positions))
    hidden.sum().backward()
    handle.remove()
    base.model.activation_checkpointing_disable()
    base.model.eval()
    assert len(tape.layers) == base.checkpoint.arch.num_layers
    assert tape.layers[0].logits.shape == (20, base.checkpoint.arch.num_experts)
    assert tape.layers[0].logits.requires_grad, "reentrant checkpointing would have cut it off"

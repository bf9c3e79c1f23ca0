"""Storage formats of the base: the stored weights are as declared, and the model computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocation import AllocationTracker
from safetensors.torch import load_file
from test_adapters import BOTH, randomised, sample
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune.adapters.provenance import BaseRecord
from finetune.adapters.read_back import read_back
from finetune.adapters.store import AdapterFile, write_adapter
from finetune.cli.main import main
from finetune.errors import CheckError
from finetune.evaluate.opening import open_model
from finetune.export.show import as_lines, measure
from finetune.kernels.experts import ExpertWeights, Mxfp4Experts, expert_block
from finetune.model.build import Base, build_base, check_unchanged
from finetune.model.checkpoint import Checkpoint
from finetune.model.experts import DenseExperts
from finetune.model.forward import logits
from finetune.model.nf4 import Nf4Experts, dequantise_nf4, frozen_linear, quantise_nf4
from finetune.model.noise import rounding_noise
from finetune.model.storage import BaseStorage, StorageConverter, check_storage, describe_storage, storage_table
from finetune.model.write import write_dense
from finetune.mxfp4.format import dequantise, quantise

CPU = torch.device("cpu")
# The 16 levels of NF4 (Dettmers et al. 2023, appendix E).
LEVELS = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=torch.float64,
)  # fmt: skip
NF4 = BaseStorage(experts="nf4", attention="nf4")


def loaded(directory: Path, storage: BaseStorage) -> Base:
    return build_base(Checkpoint.open(directory), CPU, torch.float32, 3, storage)


@pytest.fixture(scope="module")
def nf4_base(tiny_base: Path) -> Base:
    return loaded(tiny_base, NF4)


@pytest.fixture(scope="module")
def native_base(tiny_base: Path) -> Base:
    return loaded(tiny_base, BaseStorage())


def by_hand(codes: Tensor, scales: Tensor) -> Tensor:
    """NF4 by its definition, in float64: [..., in / 2] -> [..., in]."""
    numbers = torch.stack((codes >> 4, codes & 15), -1).flatten(-2)
    values = LEVELS[numbers.long()].reshape(-1, 64) * scales.double().reshape(-1, 1)
    return values.reshape(numbers.shape)


def tokens() -> Tensor:
    return torch.from_numpy(sample().ids).long()[:60]


class TestNf4:
    """Tensors of its own, then the base."""

    @pytest.mark.parametrize("shape", [(192, 64), (64, 96), (128, 2880), (2, 32)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nf4_equals_the_definition_and_the_nearest_level(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        codes, scales = quantise_nf4(weights)
        exact = by_hand(codes, scales)
        for wanted in (torch.bfloat16, torch.float32):
            assert torch.equal(dequantise_nf4(codes, scales, wanted), exact.bfloat16().to(wanted))
        blocks = weights.double().reshape(-1, 64)
        assert torch.equal(scales.double(), blocks.abs().amax(1))
        gaps = (blocks[..., None] / scales.double()[:, None, None] - LEVELS).abs().amin(-1)
        taken = (blocks - exact.reshape(-1, 64)).abs() / scales.double()[:, None]
        assert (taken - gaps).max() < 1e-6, "no other level is nearer"

    def test_nf4_equals_bitsandbytes_where_that_is_correct(self) -> None:
        """Its CPU kernel (0.50.2) reads wrong scales where a row is no whole number of blocks: then results differ."""
        from bitsandbytes import functional

        for shape, right in (((64, 2880), True), ((64, 96), False)):
            weights = torch.randn(shape).bfloat16()
            packed, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
            codes, scales = quantise_nf4(weights)
            assert torch.equal(codes.flatten(), packed.flatten()) and torch.equal(scales, state.absmax)
            ours = dequantise_nf4(codes, scales, torch.bfloat16)
            assert torch.equal(ours, by_hand(codes, scales).bfloat16())
            if right:
                assert torch.equal(ours, functional.dequantize_4bit(packed, state))

    def test_the_base_stores_bitsandbytes_codes_of_the_checkpoints_weights(
        self, nf4_base: Base, tiny_base: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        stored = {k: v for f in tiny_base.glob("*.safetensors") for k, v in load_file(f).items()}
        state = nf4_base.model.state_dict()
        lost = total = 0.0
        for name in (n.removesuffix("_blocks") for n in stored if n.endswith("_blocks")):
            weights = dequantise(stored[f"{name}_blocks"], stored[f"{name}_scales"])
            for expert, matrix in enumerate(weights):
                codes, scales = quantise_nf4(matrix)
                assert torch.equal(state[f"{name}_nf4_codes"][expert], codes)
                assert torch.equal(state[f"{name}_nf4_scales"][expert], scales)
                lost += float((by_hand(codes, scales).bfloat16() - matrix).double().square().sum())
                total += float(matrix.double().square().sum())
        assert nf4_base.storage_errors["experts"] == pytest.approx((lost / total) ** 0.5, rel=1e-5)
        assert 0.02 < nf4_base.storage_errors["experts"] < 0.15
        changes = nf4_base.storage_changes["attention"]
        assert changes["format"] == "nf4" and 0.05 < float(changes["relative_rms"]) < 0.12
        loaded(tiny_base, NF4)
        assert f"experts: stored in NF4, which changed them by {(lost / total) ** 0.5:.2%}" in capfd.readouterr().err

    def test_identity_is_of_the_checkpoint_and_a_changed_code_is_named(self, nf4_base: Base, native_base: Base) -> None:
        assert nf4_base.identity == native_base.identity == check_unchanged(nf4_base)
        experts, attention = nf4_base.model.model.layers[1].mlp.experts, nf4_base.model.model.layers[0].self_attn
        for tensor, name in (
            (experts.down_proj_nf4_codes, "down_proj_nf4_codes"),
            (attention.k_proj.weight, "k_proj.weight"),
            (attention.k_proj.weight_scales, "k_proj.weight_scales"),
        ):
            kept = tensor.clone()
            with torch.no_grad():
                tensor.view(-1)[3] += 1
                with pytest.raises(CheckError, match=name):
                    check_unchanged(nf4_base)
                tensor.copy_(kept)

    def test_the_table_names_the_format_and_another_one_is_refused(self, nf4_base: Base, native_base: Base) -> None:
        nf4, native = storage_table(nf4_base.model), storage_table(native_base.model)
        check_storage(nf4, NF4)
        check_storage(native, BaseStorage())
        sizes = {line.part: line.num_bytes for line in nf4 if line.format == "nf4"}
        arch = nf4_base.checkpoint.arch
        experts = arch.num_layers * arch.num_experts * 3 * arch.hidden * arch.expert_width
        attention = arch.num_layers * 2 * arch.hidden * (arch.query_size + arch.kv_size)
        assert sizes == {"expert weights": experts * 9 // 16, "attention weights": attention * 9 // 16}  # 4.5 bits
        for lines, wanted in ((nf4, BaseStorage()), (native, NF4), (nf4, BaseStorage(experts="nf4"))):
            with pytest.raises(CheckError, match=r"stored as"):
                check_storage(lines, wanted)
        assert "nf4" in describe_storage(nf4)

    def test_logits_equal_transformers_over_the_quantised_weights(
        self, nf4_base: Base, native_base: Base, tmp_path: Path
    ) -> None:
        write_dense(nf4_base, tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
        weight = theirs.model.layers[1].mlp.experts.down_proj[2]  # [in, out]
        state = nf4_base.model.state_dict()
        prefix = "model.layers.1.mlp.experts.down_proj_nf4"
        hand = by_hand(state[f"{prefix}_codes"][2], state[f"{prefix}_scales"][2])
        assert torch.equal(weight.detach(), hand.bfloat16().float().T)
        with torch.no_grad():
            exact = theirs(input_ids=tokens()[None]).logits[0]
            limit = rounding_noise(nf4_base.model, lambda: logits(nf4_base.model, tokens()))
            assert (logits(nf4_base.model, tokens()) - exact).abs().max() <= limit
            assert (logits(native_base.model, tokens()) - exact).abs().max() > 10 * limit, "the rounding would be seen"


class TestGradients:
    """The input's gradient through every storage, against float64 over the dequantised weights."""

    def storages(self) -> dict[str, tuple[Any, Tensor]]:
        """By name: 4 experts 64 -> 128 with a bias, and their weights in float64."""
        g = torch.Generator().manual_seed(3)
        weights = torch.randn(4, 128, 64, generator=g) * 0.3
        bias = torch.randn(4, 128, generator=g) * 0.3
        blocks, scales = quantise(weights)
        native = dequantise(blocks, scales)
        pairs = [quantise_nf4(matrix) for matrix in native]
        codes, factors = torch.stack([c for c, _ in pairs]), torch.stack([s for _, s in pairs])
        return {
            "mxfp4": (Mxfp4Experts(blocks, scales, bias), native.double()),
            "bfloat16": (DenseExperts(native, bias), native.double()),
            "nf4": (Nf4Experts(codes, factors, bias), by_hand(codes, factors).bfloat16().double()),
        }

    @pytest.mark.parametrize("name", ["mxfp4", "bfloat16", "nf4"])
    def test_experts(self, name: str) -> None:
        experts, exact = self.storages()[name]
        g = torch.Generator().manual_seed(4)
        blocks, scales = quantise(torch.randn(4, 64, 64, generator=g) * 0.3)
        down = Mxfp4Experts(blocks, scales, torch.zeros(4, 64))
        x = torch.randn(21, 64, generator=g, requires_grad=True)
        ids = torch.randint(4, (21, 1), generator=g)
        block = ExpertWeights(experts, down, 7.0, 1.702, experts_per_chunk=3)
        out = expert_block(x, ids, torch.ones(21, 1), block, None, None)
        grad_out = torch.randn(out.shape, generator=g)
        (ours,) = torch.autograd.grad(out, x, grad_out)
        leaf = x.detach().double().requires_grad_()
        hidden = torch.einsum("toi,ti->to", exact[ids[:, 0]], leaf) + experts.bias.double()[ids[:, 0]]
        gate, up = hidden[:, ::2].clamp(max=7.0), hidden[:, 1::2].clamp(-7.0, 7.0)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        second = dequantise(blocks, scales).double()[ids[:, 0]]
        (wanted,) = torch.autograd.grad(torch.einsum("toi,ti->to", second, inner), leaf, grad_out.double())
        assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()

    def test_nf4_attention(self) -> None:
        torch.manual_seed(0)
        weights = torch.randn(96, 64)
        codes, scales = quantise_nf4(weights)
        x, bias = torch.randn(5, 7, 64, requires_grad=True), torch.randn(96)
        grad_out = torch.randn(5, 7, 96)
        out = frozen_linear(x, codes, bias, scales)
        (ours,) = torch.autograd.grad(out, x, grad_out)
        exact = by_hand(codes, scales).bfloat16().double()
        assert (out - (x.double() @ exact.T + bias)).abs().max() < 1e-6 * out.abs().max()
        assert (ours - grad_out.double() @ exact).abs().max() < 1e-6 * ours.abs().max()
        assert (ours - grad_out @ weights).abs().max() > 1e-2 * ours.abs().max(), "not the weights before rounding"

    def test_nothing_dequantised_is_saved_for_the_backward_pass(self) -> None:
        codes, scales = quantise_nf4(torch.randn(512, 512))
        x = torch.randn(2, 512, requires_grad=True)
        with AllocationTracker() as tracker:
            out = frozen_linear(x, codes, None, scales)
            assert tracker.live_bytes < 512 * 512
            kept = F.linear(x, dequantise_nf4(codes, scales, torch.float32))  # control: autograd keeps the weight
            assert tracker.live_bytes > 512 * 512 * 4
        assert out.shape == kept.shape


class TestSameFunction:
    """Storage options that must not change a bit."""

    def test_bfloat16_experts_compute_the_same(self, native_base: Base, tiny_base: Path) -> None:
        dense = loaded(tiny_base, BaseStorage(experts="bfloat16"))
        check_storage(storage_table(dense.model), BaseStorage(experts="bfloat16"))
        with torch.no_grad():
            assert torch.equal(logits(dense.model, tokens()), logits(native_base.model, tokens()))
        assert dense.storage_changes == {} and check_unchanged(dense) == native_base.identity
        sizes = [line.num_bytes for base in (dense, native_base) for line in storage_table(base.model)
                 if line.part == "expert weights"]  # fmt: skip
        assert sizes[0] * 4.25 == sizes[1] * 16

    def test_the_embedding_on_the_host_computes_the_same(self, native_base: Base, tiny_base: Path) -> None:
        """In the checkpoint's dtype; rows are widened after the look-up, which gives the bits of before it."""
        host = loaded(tiny_base, BaseStorage(embedding_on_cpu=True))
        with torch.no_grad():
            assert torch.equal(logits(host.model, tokens()), logits(native_base.model, tokens()))
        (line,) = [line for line in storage_table(host.model) if line.part == "input embedding"]
        arch = host.checkpoint.arch
        assert (line.format, line.device, line.num_bytes) == ("bfloat16", "cpu", arch.vocab_size * arch.hidden * 2)
        assert check_unchanged(host) == native_base.identity
        assert host.compute_dtype == torch.float32
        moved = [line for line in storage_table(host.model) if line.part != "input embedding"]
        elsewhere = [*moved, type(line)("input embedding", "bfloat16", 1, "cuda")]
        with pytest.raises(CheckError, match="embedding is on cuda"):
            check_storage(elsewhere, BaseStorage(embedding_on_cpu=True))


def test_conversion_needs_scratch_for_one_expert() -> None:
    """Beside what comes in and what goes out: 32 experts, and the peak is a few of them in float32."""
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (32, 128, 8, 16), dtype=torch.uint8, generator=g)
    scales = torch.full((32, 128, 8), 120, dtype=torch.uint8)
    expert_bytes = 128 * 256 * 4
    for storage, bits in (("nf4", 4.5), ("bfloat16", 16)):
        holder = StorageConverter(CPU, torch.float32, BaseStorage(experts=storage))  # type: ignore[arg-type]
        holder.convert("layer.experts.down_proj_blocks", blocks)
        with AllocationTracker() as tracker:
            made = holder.convert("layer.experts.down_proj_scales", scales)
        assert sum(t.numel() * t.element_size() for t in made.values()) == 32 * 128 * 256 * bits / 8
        assert tracker.peak_bytes < 32 * 128 * 256 * bits / 8 + 9 * expert_bytes < 32 * expert_bytes * 1.1


def test_an_adapter_over_nf4_records_it_and_is_read_back_over_nf4(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = loaded(tiny_base, NF4)
    adapter = randomised(base, BOTH)
    write_adapter(tmp_path / "adapter", adapter, BOTH, BaseRecord("tiny", None, base.identity, base.storage_changes))
    result = read_back(base, adapter, tmp_path / "adapter", [sample()])
    assert result.conclusive
    assert result.base_difference <= result.base_limit
    assert result.base_limit < 1e-2
    facts = json.loads((tmp_path / "adapter" / "finetune.json").read_text())
    assert facts["base_identity"] == base.identity and facts["base_held_as"] == base.storage_changes
    capfd.readouterr()
    source = AdapterFile.open(tmp_path / "adapter")
    opened = open_model(tmp_path / "adapter", base=str(tiny_base), device="cpu")
    assert "another function" not in capfd.readouterr().err, "looked at, and opened over the same values"
    assert opened.base.storage_changes == base.storage_changes
    with torch.no_grad():
        # Opened for use it takes the flash kernel, as training would; the base above has the reference.
        difference = (logits(opened.base.model, tokens()) - logits(base.model, tokens())).abs().max()
        limit = rounding_noise(base.model, lambda: logits(base.model, tokens()))
        assert difference <= limit
        assert limit < (logits(base.model, tokens()).std() / 10)
    assert any("trained over experts in nf4" in line for line in as_lines(source, measure(source)))
    assert main(["export", str(tmp_path / "adapter"), "--to", "peft", "--out", str(tmp_path / "peft")]) == 0
    warning = capfd.readouterr().err
    assert "was trained over experts in nf4" in warning and "another function" in warning
    assert json.loads((tmp_path / "peft" / "finetune.json").read_text())["base_held_as"] == base.storage_changes

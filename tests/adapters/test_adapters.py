"""Adapters: sites, gradients against autograd on dense weights, PEFT's layout, files, audit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tolerances import apart, gradient_sum_noise, largest_share, relatively_apart, sum_noise
from transformers import AutoModelForCausalLM, Mxfp4Config

from finetune.adapters.attach import attach_adapter
from finetune.adapters.audit import audit_gradients
from finetune.adapters.config_file import CONFIG
from finetune.adapters.layout import factor_keys, flatten_a, flatten_b, unflatten
from finetune.adapters.lora import Adapter
from finetune.adapters.provenance import PROVENANCE, BaseRecord
from finetune.adapters.read_back import _result, read_back, run_child
from finetune.adapters.sites import describe_sites, plan_sites
from finetune.adapters.store import WEIGHTS, adapter_config_fields, adapter_tensors, read_adapter_into, write_adapter
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig
from finetune.data.harmony.render import Example
from finetune.errors import CheckError, InputError, MachineError
from finetune.model.build import Base, build_base
from finetune.model.checkpoint import Checkpoint
from finetune.model.forward import hidden_states, logits
from finetune.model.noise import rounding_noise

CONFIGS = {
    "both, different ranks": AdapterConfig(
        attention=AttentionAdapterConfig(rank=6, alpha=12.0), experts=ExpertAdapterConfig(rank=3, alpha=5.0)
    ),
    "both, one rank": AdapterConfig(
        attention=AttentionAdapterConfig(rank=4, alpha=8.0), experts=ExpertAdapterConfig(rank=4, alpha=8.0)
    ),
    "attention only": AdapterConfig(
        attention=AttentionAdapterConfig(rank=4, targets=("q_proj", "o_proj")), experts=ExpertAdapterConfig(rank=0)
    ),
    "experts only": AdapterConfig(
        attention=AttentionAdapterConfig(rank=0), experts=ExpertAdapterConfig(rank=4, alpha=8.0)
    ),
}
BOTH = CONFIGS["both, different ranks"]


def new_base(directory: Path) -> Base:
    return build_base(Checkpoint.open(directory), torch.device("cpu"), torch.float32, experts_per_chunk=3)


def randomised(base: Base, config: AdapterConfig, seed: int = 0) -> Adapter:
    """An adapter with an effect: B random instead of zero."""
    adapter = attach_adapter(base, config, seed=seed)
    g = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in adapter.parameters().items():
            if name.endswith("b"):
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return adapter


def write(directory: Path, adapter: Adapter, config: AdapterConfig, base: Base) -> Path:
    write_adapter(directory, adapter, config, BaseRecord("tiny", None, base.identity))
    return directory


def sample(count: int = 90, seed: int = 1) -> Example:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(199_998, (count,), generator=g).int().numpy()
    weights = torch.ones(count).numpy()
    weights[0] = 0
    return Example(ids, weights, f"random-{seed}", "nowhere:1")


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_peft_reads_it_back_in_a_fresh_process(name: str, tiny_base: Path, tmp_path: Path) -> None:
    base = new_base(tiny_base)
    adapter = randomised(base, CONFIGS[name])
    result = read_back(base, adapter, write(tmp_path / "adapter", adapter, CONFIGS[name], base), [sample()])
    assert result.max_difference <= result.limit and result.base_difference <= result.base_limit
    assert result.effect > 1 > 100 * result.limit, "an adapter that does nothing would agree with anything"


def test_read_back_notices_a_swap_that_shapes_do_not_show(tiny_base: Path, tmp_path: Path) -> None:
    """Negative control: expert-major instead of rank-major B has the same shape and another meaning."""
    base = new_base(tiny_base)
    adapter = randomised(base, BOTH)
    directory = write(tmp_path / "adapter", adapter, BOTH, base)
    tensors = load_file(directory / WEIGHTS)
    key = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    b = tensors[key]
    tensors[key] = b.reshape(len(b), 3, -1).permute(0, 2, 1).reshape(b.shape).contiguous()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckError, match="is not the model that was trained"):
        read_back(base, adapter, directory, [sample()])


def test_read_back_notices_a_missing_tensor(tiny_base: Path, tmp_path: Path) -> None:
    base = new_base(tiny_base)
    adapter = randomised(base, BOTH)
    directory = write(tmp_path / "adapter", adapter, BOTH, base)
    tensors = load_file(directory / WEIGHTS)
    del tensors["base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"]
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckError, match="did not load cleanly"):
        read_back(base, adapter, directory, [sample()])


def test_lora_gradients_equal_autograd_through_pefts_dense_weights(tiny_base: Path) -> None:
    """The same loss through PEFT's W + BA on transformers' model: every factor's gradient agrees."""
    base = new_base(tiny_base)
    adapter = randomised(base, BOTH)
    dense = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    ).float()
    peft = get_peft_model(dense, LoraConfig(**adapter_config_fields(adapter, BOTH)))
    stored = adapter_tensors(adapter)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(stored[name.replace(".default", "")])
                parameter.requires_grad_()
    ids = torch.from_numpy(sample().ids).long()
    positions = torch.arange(len(ids))[None]
    hidden = hidden_states(base.model, ids[None], positions, torch.zeros_like(positions))[0, :-1]
    loss = torch.nn.functional.cross_entropy(base.model.lm_head(hidden), ids[1:])
    loss.backward()
    found = {name: parameter.grad for name, parameter in adapter.parameters().items()}
    gradients = []

    def again() -> torch.Tensor:
        states = hidden_states(base.model, ids[None], positions, torch.zeros_like(positions))[0, :-1]
        nll = torch.nn.functional.cross_entropy(base.model.lm_head(states), ids[1:])
        gradients.append(dict(zip(found, torch.autograd.grad(nll, list(adapter.parameters().values())), strict=True)))
        return nll.detach()

    loss_noise = rounding_noise(base.model, again, apart, reference=loss.detach()) + sum_noise(loss.item(), len(ids))
    noise = max(largest_share(perturbed, found) for perturbed in gradients) + gradient_sum_noise(base.model, len(ids))
    assert loss_noise < 1e-3 > noise
    theirs = torch.nn.functional.cross_entropy(peft(input_ids=ids[None]).logits[0, :-1], ids[1:])
    theirs.backward()
    assert abs(loss.item() - theirs.item()) <= loss_noise
    by_key = {name.replace(".default", ""): p.grad for name, p in peft.named_parameters() if "lora_" in name}
    compared = 0
    for site in adapter.sites:
        experts = base.checkpoint.arch.num_experts if site.kind == "experts" else 0
        for weight in site.weights:
            stem = f"{site.module}.{weight.removesuffix('_proj')}" if experts else f"{site.module}.lora"
            theirs = unflatten(*(by_key[key] for key in factor_keys(site.layer, weight)), experts, site.rank)
            for factor, wanted in zip("ab", theirs, strict=True):
                assert wanted.abs().max() > 0
                error = relatively_apart(found[f"{stem}_{factor}"], wanted)
                assert error <= noise, f"{stem}_{factor}: {error}"
                shifted = found[f"{stem}_{factor}"].roll(1, -1)
                assert relatively_apart(shifted, wanted) > 100 * noise, "factors in another order would show"
                compared += 1
    assert compared == 2 * 4 * 2 + 2 * 4


def test_a_fresh_adapter_changes_nothing_and_disabled_is_the_base(tiny_base: Path) -> None:
    base = new_base(tiny_base)
    ids = torch.from_numpy(sample().ids).long()
    with torch.no_grad():
        plain = logits(base.model, ids)
        adapter = attach_adapter(base, BOTH, seed=0)
        assert torch.equal(logits(base.model, ids), plain)
        for name, parameter in adapter.parameters().items():
            if name.endswith("b"):
                parameter.fill_(0.1)
        assert not torch.allclose(logits(base.model, ids), plain)
        with adapter.disabled():
            assert torch.equal(logits(base.model, ids), plain)


def test_initialisation_depends_on_seed_and_site_only(tiny_base: Path) -> None:
    one = attach_adapter(new_base(tiny_base), BOTH, seed=3).parameters()
    again = attach_adapter(new_base(tiny_base), BOTH, seed=3).parameters()
    other = attach_adapter(new_base(tiny_base), BOTH, seed=4).parameters()
    experts_only = attach_adapter(new_base(tiny_base), AdapterConfig(
        attention=AttentionAdapterConfig(rank=0), experts=BOTH.experts), seed=3).parameters()  # fmt: skip
    a = "model.layers.1.mlp.experts.down_a"
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert torch.equal(one[a], experts_only[a]) and not torch.equal(one[a], other[a])
    bound = one[a].shape[-1] ** -0.5
    assert 0.9 * bound < one[a].abs().max() <= bound


def test_site_counts_of_the_published_models() -> None:
    """LoRA parameters at rank r, from the published dims: experts 11,059,200 r and 66,355,200 r, attention
    497,664 r and 746,496 r."""
    from finetune.arch import Arch
    from finetune.config.paths import shipped_dir

    for size, experts, attention in (("20b", 11_059_200, 497_664), ("120b", 66_355_200, 746_496)):
        path = shipped_dir("data") / "tokenizer" / f"gpt-oss-{size}" / "config.json"
        shape = Arch.from_config(json.loads(path.read_text()), size)
        sites = plan_sites(shape, AdapterConfig())
        totals = {kind: sum(s.num_parameters for s in sites if s.kind == kind) for kind in ("attention", "experts")}
        assert totals == {"attention": attention * 16, "experts": experts * 4}
        assert f"{experts * 4:,} parameters" in describe_sites(sites, shape)


def test_layout_round_trip_and_formula() -> None:
    """PEFT's formula: B.reshape(out, r, E).permute(2, 0, 1), A.reshape(E, r, in)."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, 7, generator=g), torch.randn(5, 11, 3, generator=g)
    flat_a, flat_b = flatten_a(a), flatten_b(b)
    assert torch.equal(flat_a.reshape(5, 3, 7), a)
    assert torch.equal(flat_b.reshape(11, 3, 5).permute(2, 0, 1), b)
    back = unflatten(flat_a, flat_b, 5, 3)
    assert torch.equal(back[0], a) and torch.equal(back[1], b)


@pytest.fixture(scope="module")
def written(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Base]:
    base = new_base(tiny_base)
    adapter = randomised(base, BOTH)
    return write(tmp_path_factory.mktemp("adapters") / "good", adapter, BOTH, base), base


def test_training_continues_from_an_adapter(written: tuple[Path, Base], tiny_base: Path) -> None:
    directory, _ = written
    base = new_base(tiny_base)
    adapter = attach_adapter(base, BOTH, seed=9)
    read_adapter_into(directory, adapter, BOTH, base.identity)
    stored = load_file(directory / WEIGHTS)
    assert all(torch.equal(stored[key], tensor) for key, tensor in adapter_tensors(adapter).items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("another base", "was trained on another base"),
        ("flipped bit", "is not the file that was written"),
        ("truncated", "is not the file that was written"),
        ("no weights", "lacks adapter_model.safetensors"),
        ("another rank", "the recipe's adapter has"),
        ("truncated, no provenance", "is truncated"),
        ("not finite, no provenance", "not finite"),
        ("missing factor, no provenance", "without its other factor"),
        ("missing site, no provenance", "does not have the tensors"),
        ("no directory", "no adapter directory"),
    ],
)
def test_a_wrong_adapter_is_refused(
    damage: str, message: str, written: tuple[Path, Base], tiny_base: Path, tmp_path: Path
) -> None:
    good, base = written
    directory, config, identity = tmp_path / "bad", BOTH, base.identity
    shutil.copytree(good, directory)
    weights = directory / WEIGHTS
    content = bytearray(weights.read_bytes())
    if "no provenance" in damage:
        (directory / PROVENANCE).unlink()
    match damage.partition(",")[0]:
        case "another base":
            identity = "0" * 64
        case "flipped bit":
            content[len(content) // 2] ^= 1
            weights.write_bytes(content)
        case "truncated":
            weights.write_bytes(content[:-100])
        case "no weights":
            weights.unlink()
        case "another rank":
            config = CONFIGS["both, one rank"]
        case "not finite" | "missing factor" | "missing site":
            tensors = load_file(weights)
            key = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
            if damage.startswith("missing"):
                del tensors[key]
                if "site" in damage:
                    del tensors[key.replace("lora_A", "lora_B")]
            else:
                tensors[key][0, 0] = float("nan")
            save_file(tensors, weights)
        case "no directory":
            directory = tmp_path / "nothing"
    fresh = new_base(tiny_base)
    with pytest.raises(InputError, match=message):
        read_adapter_into(directory, attach_adapter(fresh, config, seed=0), config, identity)


def test_an_untrained_or_broken_adapter_is_not_written(tiny_base: Path, tmp_path: Path) -> None:
    base = new_base(tiny_base)
    adapter = attach_adapter(base, BOTH, seed=0)
    with pytest.raises(CheckError, match="every lora_B is zero"):
        write(tmp_path / "a", adapter, BOTH, base)
    with torch.no_grad():
        adapter.parameters()["model.layers.0.self_attn.q_proj.lora_b"][0, 0] = float("inf")
    with pytest.raises(CheckError, match=r"layers\.0\.self_attn\.q_proj"):
        write(tmp_path / "a", adapter, BOTH, base)
    assert not (tmp_path / "a").exists()


def test_files_have_the_fields_of_peft_and_vllm(written: tuple[Path, Base]) -> None:
    directory, base = written
    config = json.loads((directory / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 6 and config["lora_alpha"] == 12
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert config["rank_pattern"] == dict.fromkeys(config["target_parameters"], 3)
    tensors = load_file(directory / WEIGHTS)
    shape = base.checkpoint.arch
    experts = "base_model.model.model.layers.0.mlp.experts"
    assert tensors[f"{experts}.base_layer.lora_A.weight"].shape == (3 * shape.num_experts, shape.hidden)
    assert tensors[f"{experts}.base_layer.lora_B.weight"].shape == (2 * shape.expert_width, 3 * shape.num_experts)
    assert tensors[f"{experts}.lora_A.weight"].shape == (3 * shape.num_experts, shape.expert_width)
    assert tensors[f"{experts}.lora_B.weight"].shape == (shape.hidden, 3 * shape.num_experts)


class TestAudit:
    def gradients(self, tiny_base: Path, *, b_is_zero: bool) -> tuple[Base, Adapter]:
        base = new_base(tiny_base)
        adapter = attach_adapter(base, BOTH, seed=0) if b_is_zero else randomised(base, BOTH)
        ids = torch.from_numpy(sample().ids).long()
        logits(base.model, ids).logsumexp(-1).sum().backward()
        return base, adapter

    def test_first_step_gradient_on_b_only(self, tiny_base: Path) -> None:
        base, adapter = self.gradients(tiny_base, b_is_zero=True)
        result = audit_gradients(base.model, adapter, "b")
        assert result.sites == 10 and result.experts_reached == (8, 8)
        assert "experts trained: yes" in result.describe()
        with pytest.raises(CheckError, match="no gradient reaches"):
            audit_gradients(base.model, adapter, "a")

    def test_gradient_on_a_after_the_first_step(self, tiny_base: Path) -> None:
        base, adapter = self.gradients(tiny_base, b_is_zero=False)
        assert audit_gradients(base.model, adapter, "a").sites == 10

    def test_experts_that_do_not_train_are_an_error(self, tiny_base: Path) -> None:
        base, adapter = self.gradients(tiny_base, b_is_zero=True)
        parameter = adapter.parameters()["model.layers.1.mlp.experts.gate_up_b"]
        parameter.grad = torch.zeros_like(parameter)
        with pytest.raises(CheckError, match=r"layers\.1\.mlp\.experts\.gate_up_b"):
            audit_gradients(base.model, adapter, "b")
        parameter.grad[5] = 1.0  # one expert is enough: others may have seen no token
        assert audit_gradients(base.model, adapter, "b").experts_reached == (8, 1)

    def test_a_gradient_on_a_frozen_tensor_is_an_error(self, tiny_base: Path) -> None:
        base, adapter = self.gradients(tiny_base, b_is_zero=True)
        weight = base.model.model.norm.weight
        weight.grad = torch.ones_like(weight)
        with pytest.raises(CheckError, match=r"model\.norm\.weight"):
            audit_gradients(base.model, adapter, "b")


def test_an_adapter_below_the_noise_is_inconclusive() -> None:
    def answer(found: float, effect: float) -> dict[str, dict[str, float]]:
        figures = {"adapted": found, "disabled": found, "effect": effect}
        return {name: {"max_difference": value, "mean_kl": value} for name, value in figures.items()}

    assert _result(answer(1e-5, 1e-2), 1, (1e-4, 1e-4), exact=True).conclusive
    for exact in (True, False):
        small = _result(answer(1e-5, 2e-5), 1, (1e-4, 1e-4), exact=exact)
        assert not small.conclusive and "inconclusive" in small.describe()


def test_a_killed_reader_is_not_reported_as_a_wrong_adapter(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(MachineError, match="killed by signal 9"):
        run_child(script, {}, "no answer")

"""rsLoRA, dropout on attention and layer ranges: trained, written so that stock PEFT agrees, resumed bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_adapters import new_base, randomised, sample, write
from transformers import GptOssConfig, GptOssForCausalLM

from finetune.adapters.attach import attach_adapter
from finetune.adapters.config_file import CONFIG
from finetune.adapters.layout import Strength, lora_config_fields
from finetune.adapters.read_back import read_back
from finetune.adapters.sites import describe_sites, plan_sites
from finetune.adapters.store import WEIGHTS, adapter_config_fields, read_adapter_into
from finetune.config.compose import compose
from finetune.config.schema import AdapterConfig, AttentionAdapterConfig, ExpertAdapterConfig, TrainerConfig
from finetune.data.batches import collate
from finetune.errors import ConfigError, InputError
from finetune.model.forward import checkpoint_activations, logits
from finetune.train.engines.base import single_engine
from finetune.train.optim import make_optimizer
from finetune.train.step import OptimiserStep
from finetune.train.trainer import seed_step

BOTH = AdapterConfig(
    attention=AttentionAdapterConfig(rank=6, alpha=12.0), experts=ExpertAdapterConfig(rank=3, alpha=5.0)
)
OPTIONS = {
    "rslora, two ranks, second layer": replace(BOTH, rslora=True, layers=(1, 1)),
    "rslora, two ranks": replace(BOTH, rslora=True),
    "first layer, experts only": replace(BOTH, attention=AttentionAdapterConfig(rank=0), layers=(0, 0)),
}
QUICK, *OTHERS = OPTIONS


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_stock_peft_equals_the_trained_model(name: str, tiny_base: Path, tmp_path: Path) -> None:
    base = new_base(tiny_base)
    adapter = randomised(base, OPTIONS[name])
    result = read_back(base, adapter, write(tmp_path / "adapter", adapter, OPTIONS[name], base), [sample()])
    assert result.max_difference <= result.limit and result.base_difference <= result.base_limit
    assert result.conclusive


@pytest.mark.parametrize("every_layer", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_patterns_set_rank_and_scale_of_every_weight_in_peft(every_layer: bool, rslora: bool) -> None:
    """PEFT's own matching of names and patterns, on a model with layers 1 and 11: no name may match another's."""
    strengths = {
        f"model.layers.{layer}.{weight}": Strength(1 + (7 * layer + number) % 5, 3.0 + number)
        for layer in (range(12) if every_layer else (1, 11))
        for number, weight in enumerate(
            ("self_attn.q_proj", "self_attn.o_proj", "mlp.router.weight", "mlp.experts.gate_up_proj",
             "mlp.experts.down_proj")
        )
    }  # fmt: skip
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2, "vocab_size": 11}
    config = GptOssConfig(**sizes, **more, num_experts_per_tok=1)
    fields = lora_config_fields(strengths, every_layer=every_layer, rslora=rslora)
    model = get_peft_model(GptOssForCausalLM(config), LoraConfig(**fields))
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_alpha"):
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            name += f".{module.parameter_name}" if hasattr(module, "parameter_name") else ""
            rank, alpha = module.r["default"], module.lora_alpha["default"]
            found[name] = (rank, alpha, module.scaling["default"])
    wanted = {n: (s.rank, s.alpha, s.alpha / (s.rank**0.5 if rslora else s.rank)) for n, s in strengths.items()}
    assert found.keys() == wanted.keys()
    assert all(found[name] == pytest.approx(wanted[name]) for name in wanted)


def test_layers_outside_the_model_are_refused_and_named_in_the_counts(tiny_base: Path) -> None:
    shape = new_base(tiny_base).checkpoint.arch
    with pytest.raises(ConfigError, match="the base has 2 layers"):
        plan_sites(shape, replace(BOTH, layers=(1, 2)))
    assert "projections in layer 1, rank 6" in describe_sites(plan_sites(shape, replace(BOTH, layers=(1, 1))), shape)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.experts.dropout=0.1", "cannot be dropped"),
        ("adapter.attention.dropout=1.0", "0 or more and below 1"),
        ("adapter.layers=[3,1]", "must be \\[first, last\\]"),
        ("adapter.layers=[1]", "adapter.layers"),
        ("adapter.layers=[a,2]", "must be a whole number"),
        ("adapter.layers=3", "a list of 2, each a whole number or null"),
    ],
)
def test_untrainable_settings_are_refused_with_the_reason(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose("quickstart", [override])


def test_they_compose_and_the_scale_is_printed() -> None:
    from finetune.config.derive import derived_lines

    config = compose(
        "quickstart", ["adapter.layers=[0,1]", "adapter.rslora=true", "adapter.attention.dropout=0.1"]
    ).config
    assert config.adapter.layers == (0, 1) and config.adapter.attention.dropout == 0.1
    assert "LoRA scale on attention = alpha 32 / sqrt(rank 16) = 8" in "\n".join(derived_lines(config))


@pytest.mark.parametrize("stored", [{"rslora": True}, {"layers": (0, 1)}, {"experts": ExpertAdapterConfig(rank=3)}])
def test_continuing_from_an_adapter_of_other_options_is_refused(
    stored: dict[str, object], tiny_base: Path, tmp_path: Path
) -> None:
    base = new_base(tiny_base)
    other = replace(BOTH, **stored)
    directory = write(tmp_path / "adapter", randomised(base, other), other, base)
    fresh = new_base(tiny_base)
    with pytest.raises(InputError, match="the recipe's adapter has"):
        read_adapter_into(directory, attach_adapter(fresh, BOTH, seed=0), BOTH, base.identity)


def test_equal_adapters_give_equal_bytes(tiny_base: Path, tmp_path: Path) -> None:
    """PEFT's own writer lists its targets in the order of a set, which changes from process to process."""
    base = new_base(tiny_base)
    adapter = randomised(base, BOTH)
    one, other = (write(tmp_path / name, adapter, BOTH, base) for name in ("one", "other"))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}
    stored = json.loads((one / CONFIG).read_text())
    assert stored["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert adapter_config_fields(adapter, BOTH).items() <= stored.items()


class TestDropout:
    DROPPED = replace(BOTH, attention=AttentionAdapterConfig(rank=4, alpha=8.0, dropout=0.5))

    def steps(
        self, directory: Path, numbers: list[int], *, seeded: bool = True, draws: int = 0
    ) -> dict[str, torch.Tensor]:
        """Parameters after the steps of these numbers, each on the same sequence."""
        base = new_base(directory)
        adapter = randomised(base, self.DROPPED)
        checkpoint_activations(base.model)  # a layer computed again must draw the same again
        parameters = adapter.parameters()
        config = TrainerConfig()
        step = OptimiserStep(config, base, single_engine(parameters, make_optimizer(parameters, config), config))
        for number in numbers:
            torch.rand(draws)  # what an evaluation in between might draw
            if seeded:
                seed_step(0, number, 0)
            step([collate([[sample()]])], 1e-2, number + 1)
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def test_dropout_of_a_step_depends_on_its_number_only(self, tiny_base: Path) -> None:
        """With plain resuming (parameters and optimiser restored) this is what makes it bit for bit."""
        one, again = self.steps(tiny_base, [0, 1]), self.steps(tiny_base, [0, 1], draws=17)
        assert all(torch.equal(one[name], again[name]) for name in one)
        other = self.steps(tiny_base, [0, 2])
        assert any(not torch.equal(one[name], other[name]) for name in one), "two steps must not draw the same"
        torch.manual_seed(0)
        unseeded = [self.steps(tiny_base, [0], seeded=False, draws=draws) for draws in (0, 17)]
        assert any(not torch.equal(unseeded[0][name], unseeded[1][name]) for name in one), "the comparison can fail"

    def test_it_drops_in_training_only_and_keeps_the_mean(self, tiny_base: Path) -> None:
        base = new_base(tiny_base)
        adapter = randomised(base, self.DROPPED)
        q_proj = adapter.modules[0]
        x = torch.randn(3, 64)
        assert torch.equal(q_proj(x), q_proj(x))
        plain = q_proj(x)
        q_proj.train()
        drawn = torch.stack([q_proj(x) for _ in range(4000)])
        assert (drawn[0] - plain).abs().max() > 1e-2
        assert (drawn.mean(0) - plain).abs().max() < 0.1 * (drawn.std(0)).max()
        ids = torch.from_numpy(sample().ids).long()
        base.model.eval()
        assert torch.equal(logits(base.model, ids), logits(base.model, ids))


def test_a_stopped_run_with_dropout_resumes_bit_for_bit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run: four steps at once, and two, a checkpoint, then two more."""
    from finetune.train.run import train
    from finetune.train.run_directory import Run

    lines = [
        {"messages": [{"role": "user", "content": f"word {n} " * 20}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    settings = [
        "data=own", f"data.train.mine.path={tmp_path / 'data.jsonl'}", "data.max_length=256", f"model.path={tiny_base}",
        "adapter.attention.dropout=0.3", "adapter.rslora=true", "adapter.layers=[1,1]", "trainer.max_steps=4",
        "trainer.epochs=9", "trainer.activation_checkpointing=true", "save.every_steps=2", "save.keep=9",
        "evaluate.every_steps=null", "evaluate.validation_examples=null", "evaluate.test_examples=null",
        "export.read_back=never", f"output_dir={tmp_path}",
    ]  # fmt: skip
    whole = train(compose("quickstart", [*settings, "name=whole"]), lambda path: None)
    resumed, unseeded = (stopped_after_two_steps(whole, tmp_path / name) for name in ("resumed", "unseeded"))
    torch.rand(100)  # another process has drawn other numbers
    train(Run.open(resumed), lambda path: None)
    monkeypatch.setattr("finetune.train.trainer.seed_step", lambda *_: None)
    train(Run.open(unseeded), lambda path: None)
    weights = [(run / "adapter" / WEIGHTS).read_bytes() for run in (whole, resumed, unseeded)]
    assert weights[0] == weights[1] != weights[2], "without seeding by step the comparison fails"
    losses = [[line["loss"] for line in metrics(run) if line["kind"] == "step"] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def stopped_after_two_steps(whole: Path, run: Path) -> Path:
    """A copy of a finished run as a kill after its second step would have left it."""
    shutil.copytree(whole, run)
    for path in (run / "adapter", run / "checkpoints" / "step-00000004"):
        shutil.rmtree(path)
    facts = json.loads((run / "manifest.json").read_text()) | {"status": "stopped"}
    (run / "manifest.json").write_text(json.dumps(facts))
    return run


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

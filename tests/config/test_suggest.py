"""Suggestions for unknown keys: other tools' words lead to the keys that mean the same."""

from __future__ import annotations

import pytest

from finetune.cli.main import main
from finetune.config.compose import compose
from finetune.config.other_tools import _KEYS, _REMARKS, keys_for, remark_on
from finetune.config.schema_paths import all_paths, dotted, type_at
from finetune.errors import ConfigError

MEANT = {
    "lora_alpha": "did you mean adapter.attention.alpha or adapter.experts.alpha?",
    "lora_r": "did you mean adapter.attention.rank or adapter.experts.rank?",
    "r": "did you mean adapter.attention.rank or adapter.experts.rank?",
    "lora_dropout": "did you mean adapter.attention.dropout?",
    "target_modules": "did you mean adapter.attention.targets or adapter.experts.rank?",
    "lr": "did you mean trainer.learning_rate?",
    "batch_size": "did you mean trainer.micro_batch_size or trainer.gradient_accumulation_steps?",
    "per_device_train_batch_size": "did you mean trainer.micro_batch_size or trainer.gradient_accumulation_steps?",
    "num_train_epochs": "did you mean trainer.epochs?",
    "gradient_clipping": "did you mean trainer.max_grad_norm?",
    "datasets": "did you mean data.train.NAME.path?",
    "max_seq_length": "did you mean data.max_length?",
    "bf16": "did you mean model.compute_dtype?",
    "packing": "that is data.pack",
    "num_gpus": "did you mean distributed.num_processes?",
    "push_to_hub": "there is no key: `finetune export RUN`",
    "max_gradient_norm": "did you mean trainer.max_grad_norm?",
}


@pytest.mark.parametrize("word", MEANT)
def test_another_tools_key_leads_to_ours(word: str) -> None:
    for key in {word, f"trainer.{word}"} - {"trainer.max_gradient_norm"}:
        with pytest.raises(ConfigError) as caught:
            compose("quickstart", [f"{key}=1"])
        assert f"command line: {key} is not a key" in str(caught.value)
        assert MEANT[word] in (caught.value.fix or "")


def test_output_dir_is_found_in_any_section() -> None:
    with pytest.raises(ConfigError, match=r"did you mean output_dir\?"):
        compose("quickstart", ["trainer.output_dir=x"])


def test_the_tables_name_keys_that_exist_and_hide_none() -> None:
    ours = {dotted(path) for path in all_paths(like=("data", "train", "NAME"))}
    for word, keys in _KEYS.items():
        assert set(keys) <= ours, f"{word} leads to {keys}"
        assert type_at((word,)) is None, f"{word} is a key"
        assert remark_on(word) is None, f"{word} is in both tables"
    for word in _REMARKS:
        assert type_at((word,)) is None and keys_for(word) == ()


@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ("--epochs=3", "settings are written without dashes: trainer.epochs=3"),
        ("--lr=1e-4", "settings are written without dashes: trainer.learning_rate=1e-4"),
        ("--lora-alpha=8", "settings are written without dashes: adapter.attention.alpha=8 adapter.experts.alpha=8"),
        ("--packing", "that is data.pack"),
    ],
)
def test_a_setting_written_as_an_option(option: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", option]) == 2
    assert fix in capsys.readouterr().err

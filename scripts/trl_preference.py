"""Train the tiny base with TRL's DPOTrainer and store its figures: the numbers our preference steps are held to.

    pip install trl==1.16.0
    python scripts/trl_preference.py                  # writes tests/objectives/trl_golden.json

The same weights (transformers' gpt-oss on the dequantised base), the same adapter (stock PEFT) and the same pairs as
tests/objectives/test_trl.py; four optimiser steps of four pairs for every loss. TRL computes every prompt twice, in
padded batches with transformers' own attention; nothing of ours takes part but the adapter's starting values.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/objectives")]
LOSSES = ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sigmoid_norm", "sigmoid+sft")
FIGURES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")  # fmt: skip
SMOOTHING = {"robust": 0.2}


def main() -> None:
    """Write the golden file."""
    from finetune.model.tiny import write_tiny_base

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = Path(scratch, "base"), Path(scratch, "adapter")
        write_tiny_base(base, seed=0, kind="random")
        write_starting_adapter(base, adapter)
        steps = {loss: train(base, adapter, loss, Path(scratch, "out")) for loss in LOSSES}
    import peft
    import transformers
    import trl

    versions = {module.__name__: module.__version__ for module in (trl, peft, transformers, torch)}
    target = ROOT / "tests/objectives/trl_golden.json"
    target.write_text(json.dumps({"versions": versions, "smoothing": SMOOTHING, "steps": steps}, indent=1) + "\n")
    print(f"wrote {target.relative_to(ROOT)}")


def write_starting_adapter(base: Path, directory: Path) -> None:
    """Write our starting adapter in PEFT's layout."""
    from preference_runs import PreferenceRun
    from router_runs import SMALL

    from finetune.adapters.store import BaseRecord, write_adapter
    from finetune.config.schema import DpoConfig

    run = PreferenceRun(base, DpoConfig())
    write_adapter(directory, run.adapter, SMALL, BaseRecord("tiny", None, run.base.identity))


def train(base: Path, adapter: Path, loss: str, out: Path) -> list[dict[str, float]]:
    """Four steps of TRL with one loss: the logged figures of each."""
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from preference_runs import LEARNING_RATE, PAIRS_PER_STEP, made_groups
    from safetensors.torch import load_file
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class OurPairs(DPOTrainer):  # type: ignore[misc]
        """Takes token ids as they are, in their order."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    records = [
        {
            "prompt_ids": answers[0].ids[: answers[0].shared].tolist(),
            "chosen_ids": answers[0].ids[answers[0].shared :].tolist(),
            "rejected_ids": answers[1].ids[answers[1].shared :].tolist(),
        }
        for answers, _ in made_groups(4 * PAIRS_PER_STEP)
    ]
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    dense = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32, attn_implementation="eager"
    )
    names = loss.split("+")
    settings = DPOConfig(
        output_dir=str(out), use_cpu=True, bf16=False, per_device_train_batch_size=PAIRS_PER_STEP, max_steps=4,
        logging_steps=1, report_to="none", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0,
        max_grad_norm=0, weight_decay=0, optim="adamw_torch", router_aux_loss_coef=0.0, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True, loss_type=names, loss_weights=[1.0] * len(names), beta=0.1,
        label_smoothing=SMOOTHING.get(loss, 0.0), max_length=None, seed=0,
    )  # fmt: skip
    lora = LoraConfig.from_pretrained(adapter)
    lora.inference_mode = False  # as a file it is for inference
    trainer = OurPairs(
        model=dense,
        args=settings,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
        peft_config=lora,
    )
    found = set_peft_model_state_dict(trainer.model, load_file(adapter / "adapter_model.safetensors"))
    assert not found.unexpected_keys, found.unexpected_keys
    trainer.train()
    return [{name: entry[name] for name in FIGURES} for entry in trainer.state.log_history[:4]]


if __name__ == "__main__":
    main()

"""`finetune recipes new PATH`: a commented recipe for one's own file, made by looking at it, and checked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.groups import checked_option
from finetune.config.recipes import find_recipe
from finetune.console import say, warn
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.data.look import FileFacts

DEFAULT_MODEL = "gpt_oss_20b"
LONGEST_ROW = 16_384
MOST_SKIPPED = 0.05  # data.max_skipped_share's default: with more bad rows than this a run stops
_ADAPTER_AND_TRAINER = """
adapter:
  attention: {rank: 16, alpha: 32.0} # higher rank: more capacity, memory and overfitting
  experts: {rank: 4, alpha: 8.0} # of every expert, so it costs most of the memory; 0 leaves the experts alone

trainer:
  epochs: 2 # more fits the training rows closer; watch the validation loss turn
  learning_rate: 2.0e-4 # higher learns faster until it becomes unstable
  rows_per_micro_step: 1 # more: faster while memory lasts; lower micro_steps to keep the step
  micro_steps: 4 # more: steadier gradients, fewer updates
"""


def new_recipe(path: Path, *, source: str | None, data: str | None, model: str | None) -> None:
    """Write a recipe and check that it composes.

    Args:
        path: the new YAML file.
        source: a shipped recipe to begin from. None: a plain one.
        data: a file of training records to look at. None: the source's data, or a place to fill in.
        model: an option of configs/model/ for a recipe on `data`; None: gpt_oss_20b.

    Raises:
        ConfigError: `path` exists or is no YAML file; no such recipe or model; both `source` and `data`.
        InputError: the data file cannot be used.
    """
    from finetune.config.compose import compose

    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"a recipe is a .yaml file, not {path}", fix=f"finetune recipes new {path}.yaml")
    if path.exists():
        raise ConfigError(f"{path} exists already", why="nothing is ever overwritten", fix="choose another name")
    if model is not None:
        checked_option("model", model, "--model")
        if source is not None:
            raise ConfigError(
                "--model goes with --data: a copy keeps its recipe's own model",
                fix=f"copy it, and in the copy write `- override /model: {model}` under defaults",
            )
    if source is not None and data is not None:
        raise ConfigError("--from and --data do not go together", fix="name your file in the recipe that --from copies")
    if source is not None:
        text = find_recipe(source).read_text(encoding="utf-8")
    elif data is not None:
        from finetune.data.look import look_at

        facts = look_at(data)
        _report(facts, data)
        text = recipe_text(path.stem, data, facts, model or DEFAULT_MODEL)
    else:
        raise ConfigError("say what to begin with", fix="--data FILE looks at a file; --from NAME copies a recipe")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    compose(str(path))
    say(str(path), result=True)
    say(f"look at it, then: finetune data preview {path}; finetune train {path} --dry-run; finetune train {path}")


def recipe_text(name: str, data: str, facts: FileFacts, model: str) -> str:
    """YAML of a recipe for a file."""
    lines = [
        "# @package _global_",
        f"# {name}: {model} on {Path(data).name} (written by `finetune recipes new`)",
        "",
        "defaults:",
        f"  - override /model: {model}",
        "  - override /data: own",
        "",
        "seed: 0 # another one shows how much of a gain is luck",
        "",
        "data:",
        *_sources(data, facts),
        *_length(facts),
    ]
    if facts.thinking_share == 0:
        lines.append("  reasoning_effort: low # no record shows any thinking, so low is the effort that they show")
    if facts.bad_rows and len(facts.bad_rows) <= MOST_SKIPPED * facts.records:
        lines.append(f"  on_bad_row: skip # {len(facts.bad_rows)} of {facts.records} rows cannot be used")
    evaluated = "test" in facts.splits
    validated = "validation" in facts.splits or facts.has_ids
    text = "\n".join(lines) + "\n" + _ADAPTER_AND_TRAINER
    if validated:
        text += "\nevaluate:\n  every_steps: 50 # optimiser steps between two looks at the validation loss\n"
        if evaluated:
            text += "  test_rows: 500 # scored before and after; fewer: faster, wider intervals\n"
        text += "\nsave:\n  every_steps: 50 # optimiser steps that a crash can cost at most\n"
        text += "  best_metric: validation_loss # exports the best adapter; `none` exports the last\n"
    return text


def _sources(data: str, facts: FileFacts) -> list[str]:
    def source(split: str) -> list[str]:
        if facts.split_field is None:
            return [f"  {split}:", f"    mine: {{path: {_quoted(data)}}}"]
        where = f"{{{_quoted(facts.split_field)}: {_quoted(facts.splits[split])}}}"
        return [f"  {split}:", f"    mine: {{path: {_quoted(data)}, where: {where}}}"]

    lines = source("train")
    for split in ("validation", "test"):
        if split in facts.splits:
            lines += source(split)
    if "validation" not in facts.splits:
        if facts.has_ids:
            lines.append(
                "  validation_split: {key: id, share: 0.05} # name a field here whose values must not stand on both "
                "sides, such as a document's"
            )
        else:
            lines.append("  # no validation: give the records an `id` (then validation_split), or name other files")
    if "test" not in facts.splits:
        lines.append("  # no test rows: add `test:` sources for figures before and after")
    return lines


def _length(facts: FileFacts) -> list[str]:
    seen = (
        f"the longest of {facts.records:,} records looked at has {facts.longest:,} tokens, 99 % at most {facts.most:,}"
    )
    if facts.longest > LONGEST_ROW:
        return [f"  max_length: {LONGEST_ROW} # {seen}", "  too_long: drop # or `truncate` context; `error` stops"]
    # Room for several records in a row, so that packing fills it.
    wanted = max(2048, 2 ** math.ceil(math.log2(facts.longest)))
    return [f"  max_length: {wanted} # tokens in a packed row; {seen}"]


def _report(facts: FileFacts, data: str) -> None:
    more = " at least" if facts.has_more else ""
    say(
        f"{data}:{more} {facts.records:,} records, form {facts.form}, longest {facts.longest:,} tokens, "
        f"{facts.trained_share:.0%} of the tokens trained"
    )
    if facts.split_field:
        say(f"split by {facts.split_field}: {', '.join(f'{s} is {v}' for s, v in facts.splits.items())}")
    if facts.answers:
        scored = ": scored as labels, given test rows" if 2 <= facts.answers <= 64 else ""
        say(f"{facts.answers:,} different answers{scored}")
    if len(facts.bad_rows) > MOST_SKIPPED * facts.records:
        warn(f"{len(facts.bad_rows)} of {facts.records} rows cannot be used: a run will stop until they are corrected")
    for row in facts.bad_rows[:3]:
        warn(f"{row.where}: {row.reason}")


def _quoted(text: str) -> str:
    """A YAML scalar that reads as this text whatever it holds."""
    import json

    return json.dumps(text, ensure_ascii=False)

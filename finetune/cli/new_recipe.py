"""`finetune recipes new PATH`: a commented recipe for one's own file, made by looking at it, and checked."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import log
from finetune.cli.file_report import LONGEST_ROW, is_skippable, report_file
from finetune.config.groups import checked_option
from finetune.config.recipes import find_recipe
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.data.look import FileFacts

DEFAULT_MODEL = "gpt_oss_20b"
_ADAPTER_AND_TRAINER = """
adapter:
  attention: {rank: 16, alpha: 32.0} # higher rank: more capacity, memory and overfitting
  experts: {rank: 4, alpha: 8.0} # of every expert, so it costs most of the memory; 0 leaves the experts alone

trainer:
  epochs: 2 # more fits the training rows closer; watch the validation loss turn
  learning_rate: 2.0e-4 # higher learns faster until it becomes unstable
  micro_batch_size: 1 # more: faster while memory lasts; lower gradient_accumulation_steps to keep the step
  gradient_accumulation_steps: 4 # more: steadier gradients, fewer updates
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
        report_file(facts, data)
        text = recipe_text(path.stem, data, facts, model or DEFAULT_MODEL)
    else:
        raise ConfigError("say what to begin with", fix="--data FILE looks at a file; --from NAME copies a recipe")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    compose(str(path))
    log.result(str(path))
    recipe = shlex.quote(str(path))
    log.info(
        f"look at it, then: finetune data preview {recipe}; finetune train {recipe} --dry-run; finetune train {recipe}"
    )


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
        *_sources(facts),
        *_length(facts),
    ]
    if not facts.with_thinking:
        lines.append("  reasoning_effort: low # no record shows any thinking, so low is the effort that they show")
    if facts.bad_rows and is_skippable(facts):
        lines.append(f"  on_bad_record: skip # {len(facts.bad_rows):,} of {facts.rows:,} rows cannot be used")
    text = "\n".join(lines) + "\n" + _ADAPTER_AND_TRAINER
    if facts.validates:
        text += "\nevaluate:\n  every_steps: 50 # optimiser steps between two looks at the validation loss\n"
        if facts.tests:
            text += "  test_examples: 500 # scored before and after; fewer: faster, wider intervals\n"
        text += "\nsave:\n  every_steps: 50 # optimiser steps that a crash can cost at most\n"
        text += "  best_metric: validation_loss # exports the best adapter; `none` exports the last\n"
    return text


def _sources(facts: FileFacts) -> list[str]:
    """The splits, each with a source for every value that names it: `where` compares with one."""
    keys = [f"path: {_quoted(facts.source.path)}"]
    if facts.source.columns:
        keys.append(f"columns: {_mapping(facts.source.columns)}")
    if facts.source.form != "auto":
        keys.append(f"form: {facts.source.form}")
    name, named = (facts.split.name, facts.split.splits) if facts.split else ("", {})
    lines = [] if named else ["  train:", f"    mine: {{{', '.join(keys)}}}"]
    for split, values in named.items():
        lines.append(f"  {split}:")
        for number, value in enumerate(values, start=1):
            where = f"where: {_mapping({name: value})}"
            lines.append(f"    mine{number if number > 1 else ''}: {{{', '.join([*keys, where])}}}")
    if "validation" not in named:
        if facts.id_share is not None:
            lines.append(
                f"  validation_split: {{key: id, share: {facts.id_share:g}}} # name a field here whose values must not "
                "stand on both sides, such as a document's"
            )
        else:
            lines.append(f"  # no validation: {facts.why_no_id_split}; name other sources in `validation:`")
    if "test" not in named:
        lines.append("  # no test rows: add `test:` sources for figures before and after")
    return lines


def _length(facts: FileFacts) -> list[str]:
    seen = (
        f"the longest of {len(facts.lengths):,} looked at has {facts.longest:,} tokens, "
        f"99 % at most {facts.length_of_most:,}"
    )
    if facts.longest > LONGEST_ROW:
        return [f"  max_length: {LONGEST_ROW} # {seen}", "  too_long: drop # or `truncate` context; `error` stops"]
    # Room for several records in a row, so that packing fills it.
    wanted = max(2048, 2 ** math.ceil(math.log2(facts.longest)))
    return [f"  max_length: {wanted} # tokens in a packed row; {seen}"]


def _mapping(pairs: Mapping[str, str]) -> str:
    return f"{{{', '.join(f'{_quoted(key)}: {_quoted(value)}' for key, value in pairs.items())}}}"


def _quoted(text: str) -> str:
    """A YAML scalar that reads as this text whatever it holds."""
    return json.dumps(text, ensure_ascii=False)

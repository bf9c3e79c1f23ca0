"""`finetune recipes new PATH`: inspect a data file, report on it, and write a commented recipe that composes."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import log
from finetune.config.recipes import checked_option, find_recipe
from finetune.config.schema import DataConfig
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.data.inspect_file import FileFacts

LONGEST_EXAMPLE = 16_384
_BAD_RECORDS_SHOWN = 3
DEFAULT_MODEL = "gpt_oss_20b"


def is_skippable(facts: FileFacts) -> bool:
    """Whether a run may skip the records that cannot be used."""
    return len(facts.bad_records) <= DataConfig.max_skipped_ratio * facts.rows


def report_file(facts: FileFacts, path: str) -> None:
    """Log what is in a file, what the recipe leaves out, and what is missing."""
    more = " at least" if facts.has_more else ""
    log.info(
        f"{path}:{more} {facts.rows:,} records, form {facts.form}, longest {facts.longest:,} tokens, "
        f"{facts.trained_share:.0%} of the tokens trained"
    )
    _report_columns(facts)
    _report_split(facts)
    _report_left_out(facts)
    _report_labels(facts)
    if facts.repeated:
        both_sides = "" if facts.id_share is None else ": some may be in training and in validation"
        log.warning(
            f"{facts.repeated:,} of {facts.records:,} records repeat an earlier one, question and answer{both_sides}; "
            "`finetune data stats` names them"
        )


def _report_columns(facts: FileFacts) -> None:
    source = facts.source
    if source.columns:
        read = ", ".join(f"{theirs} as {ours}" for ours, theirs in source.columns.items())
        log.warning(f"no form has these columns; the recipe reads {read}: correct `columns` if that is wrong")
    if source.form != "auto":
        log.warning(
            f"the records fit several forms; the recipe reads them as {source.form}: correct `form` if that is wrong"
        )
    if facts.unused:
        log.warning(f"not used: {_counted(facts.unused)}")


def _report_split(facts: FileFacts) -> None:
    split = facts.split
    if split and split.splits:
        named = ", ".join(f"{name} is {' and '.join(values)}" for name, values in split.splits.items())
        log.info(f"split by {split.name}: {named}")
        if split.others:
            log.warning(
                f"`{split.name}` has {_counted(split.others)}, which names no split: the recipe leaves these out"
            )
        if split.missing:
            log.warning(f"{split.missing:,} records have no `{split.name}`: the recipe leaves them out")
    elif split:
        log.warning(
            f"`{split.name}` has {_counted(split.others)}, which does not separate training from other records: all "
            f"are trained; if some must not be, write `where: {{{split.name}: ...}}` beside the path"
        )
    if not facts.validates:
        log.info(f"no validation records ({facts.why_no_id_split}): overfitting will not be noticed")
    elif facts.id_share is not None:
        log.info(f"validation records: about {facts.id_share:.0%} of the `id`s")
    if not facts.tests:
        log.info("no test records, so no figures before and after: name a file under `test:`")


def _report_left_out(facts: FileFacts) -> None:
    if facts.with_turns:
        every = "data.earlier_thinking=split" if facts.with_thinking else "data.loss.turns=all"
        log.info(
            f"{facts.with_turns:,} of {facts.records:,} records have several turns: the last is trained, the others "
            f"are context; {every} trains every one"
        )
    if facts.longest > LONGEST_EXAMPLE:
        dropped = sum(length > LONGEST_EXAMPLE for length in facts.lengths)
        log.info(
            f"{dropped:,} of {len(facts.lengths):,} inspected ones have more than {LONGEST_EXAMPLE:,} tokens: the recipe "
            "drops them (data.too_long)"
        )
    if not facts.bad_records:
        return
    bad = f"{len(facts.bad_records):,} of {facts.rows:,} records cannot be used"
    if is_skippable(facts):
        log.warning(f"{bad}: the recipe skips them (data.on_bad_record)")
    else:
        log.warning(f"{bad}: a run will stop until they are corrected")
    for record in facts.bad_records[:_BAD_RECORDS_SHOWN]:
        log.warning(f"{record.where}: {record.reason}")


def _report_labels(facts: FileFacts) -> None:
    if not facts.labelled:
        return
    if facts.labelled < facts.records:
        log.info(
            f"{facts.records - facts.labelled:,} of {facts.records:,} records have no `answer`: labels are not scored"
        )
    elif 2 <= facts.answers <= 64:
        log.info(f"{facts.answers:,} different answers: scored as labels if there are test records")
    else:
        log.info(f"{facts.answers:,} different answers: not scored as labels, which takes 2 to 64")


def _counted(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ({count:,})" for value, count in values.items())


_ADAPTER_AND_TRAINER = """
adapter:
  attention: {rank: 16, alpha: 32.0} # higher rank: more capacity, memory and overfitting
  experts: {rank: 4, alpha: 8.0} # of every expert, so it costs most of the memory; 0 leaves the experts frozen

trainer:
  epochs: 2 # more fits the training examples closer; watch the validation loss turn
  learning_rate: 2.0e-4 # higher learns faster until it becomes unstable
  micro_batch_size: 1 # more: faster while memory lasts; lower gradient_accumulation_steps to keep the step
  gradient_accumulation_steps: 4 # more: steadier gradients, fewer updates
"""


def new_recipe(path: Path, *, source: str | None, data: str | None, model: str | None) -> None:
    """Write a recipe and check that it composes.

    Args:
        path: the new YAML file.
        source: a shipped recipe to copy. None: a plain one.
        data: a file of training records to inspect. None: the data of `source`.
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
        from finetune.data.inspect_file import look_at

        facts = look_at(data)
        report_file(facts, data)
        text = recipe_text(path.stem, data, facts, model or DEFAULT_MODEL)
    else:
        raise ConfigError("give --data or --from", fix="--data FILE inspects a file; --from NAME copies a recipe")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    compose(str(path))
    log.result(str(path))
    recipe = shlex.quote(str(path))
    log.info(
        f"read it, then: finetune data preview {recipe}; finetune train {recipe} --dry-run; finetune train {recipe}"
    )


def recipe_text(name: str, data: str, facts: FileFacts, model: str) -> str:
    """Write the YAML of a recipe for a file."""
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
        lines.append("  reasoning_effort: low # no record has any thinking, which fits low effort")
    if facts.bad_records and is_skippable(facts):
        lines.append(f"  on_bad_record: skip # {len(facts.bad_records):,} of {facts.rows:,} records cannot be used")
    text = "\n".join(lines) + "\n" + _ADAPTER_AND_TRAINER
    if facts.validates:
        text += "\nevaluate:\n  every_steps: 50 # optimiser steps between two measurements of the validation loss\n"
        if facts.tests:
            text += "  test_examples: 500 # scored before and after; fewer: faster, wider intervals\n"
        text += "\nsave:\n  every_steps: 50 # a crash costs at most so many optimiser steps\n"
        text += "  best_metric: validation_loss # exports the best adapter; `none` exports the last\n"
    return text


def _sources(facts: FileFacts) -> list[str]:
    """Write the splits, each with one source per value that names it, since `where` compares with one value."""
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
                "be on both sides, such as a document's"
            )
        else:
            lines.append(f"  # no validation: {facts.why_no_id_split}; name other sources in `validation:`")
    if "test" not in named:
        lines.append("  # no test records: add `test:` sources for figures before and after")
    return lines


def _length(facts: FileFacts) -> list[str]:
    seen = (
        f"the longest of {len(facts.lengths):,} inspected has {facts.longest:,} tokens, "
        f"99 % at most {facts.length_of_most:,}"
    )
    if facts.longest > LONGEST_EXAMPLE:
        return [f"  max_length: {LONGEST_EXAMPLE} # {seen}", "  too_long: drop # or `truncate` context; `error` stops"]
    # Room for several records per sequence, so that packing fills it.
    wanted = max(2048, 2 ** math.ceil(math.log2(facts.longest)))
    return [f"  max_length: {wanted} # tokens of a packed sequence; {seen}"]


def _mapping(pairs: Mapping[str, str]) -> str:
    return f"{{{', '.join(f'{_quoted(key)}: {_quoted(value)}' for key, value in pairs.items())}}}"


def _quoted(text: str) -> str:
    """Quote any text as a YAML scalar."""
    return json.dumps(text, ensure_ascii=False)

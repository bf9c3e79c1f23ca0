"""`finetune recipes new PATH`: write a commented recipe for a data file after inspecting it, and check it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from finetune import log
from finetune.config.recipes import checked_option, find_recipe
from finetune.errors import ConfigError, InputError
from finetune.files import write_text
from finetune.log import printable

if TYPE_CHECKING:
    from finetune.data.inspect_file import FileSummary

DEFAULT_MODEL = "gpt_oss_20b"
LONGEST_SEQUENCE = 16_384
_SUPERVISED_RATE = "learning_rate: 2.0e-4 # higher learns faster until it becomes unstable"
_PREFERENCE_RATE = "learning_rate: null # the objective's default; higher prefers sooner, until answers degrade"
_ADAPTER_AND_TRAINER = f"""
adapter:
  attention: {{rank: 16, alpha: 32.0}} # higher rank: more capacity, memory and overfitting
  experts: {{rank: 4, alpha: 8.0}} # per expert, so it takes most of the memory; rank 0 leaves the experts frozen

trainer:
  epochs: 2 # more fits the training records more closely; watch for the validation loss to rise
  {_SUPERVISED_RATE}
  micro_batch_size: 1 # more: faster while memory lasts; lower gradient_accumulation_steps to keep the step
  gradient_accumulation_steps: 4 # more: steadier gradients, fewer updates
"""


def new_recipe(path: Path, *, source: str | None, data: str | None, model: str | None) -> None:
    """Write a recipe and check that it composes.

    Args:
        path: the new YAML file.
        source: a shipped recipe to begin from. None: a plain one.
        data: a file of training records to inspect. None: the source's data.
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
        from finetune.data.inspect_file import inspect_file

        summary = inspect_file(data)
        report_file(summary, data)
        text = recipe_text(path.stem, data, summary, model or DEFAULT_MODEL)
    else:
        raise ConfigError("nothing to begin with", fix="--data FILE inspects a file; --from NAME copies a recipe")
    write_text(path, text)
    try:
        compose(str(path))
    except BaseException:
        path.unlink()  # nothing is left that cannot be used
        raise
    log.result(str(path))
    recipe = shlex.quote(str(path))
    commands = (f"data stats {recipe}", f"data preview {recipe}", f"train {recipe} --dry-run", f"train {recipe}")
    log.info(f"look at it, then: {'; '.join(f'finetune {command}' for command in commands)}")


def report_file(summary: FileSummary, path: str) -> None:
    """Log the contents of a file, the records that the recipe leaves out, and what the file lacks."""
    more = " at least" if summary.has_more else ""
    trained = summary.num_trained_tokens / sum(summary.lengths)
    log.info(
        f"{path}:{more} {summary.num_read:,} records, form {summary.forms.most_common(1)[0][0]}, longest "
        f"{summary.longest:,} tokens, {trained:.0%} of the tokens trained"
    )
    _report_split(summary)
    for text in _warnings(summary):
        log.warning(text)
    if summary.num_with_turns:
        every = "data.earlier_thinking=split" if summary.num_with_thinking else "data.loss.turns=all"
        log.info(
            f"{summary.num_with_turns:,} of {summary.num_usable:,} records have several turns: the last is trained, "
            f"the others are context; {every} trains every one"
        )
    too_long = sum(length > LONGEST_SEQUENCE for length in summary.lengths)
    if too_long:
        log.info(
            f"{too_long:,} of {len(summary.lengths):,} tokenised examples have more than {LONGEST_SEQUENCE:,} tokens: "
            "the recipe drops such (data.too_long)"
        )


def _report_split(summary: FileSummary) -> None:
    if summary.split and summary.split.splits:
        named = ", ".join(f"{name} is {' and '.join(values)}" for name, values in summary.split.splits.items())
        log.info(f"split by {summary.split.name}: {named}")
    if not summary.has_validation:
        log.info(f"no validation records ({_why_no_id_split(summary)}): nothing will show when overfitting begins")
    elif summary.id_share is not None:
        log.info(f"validation records: {summary.id_share:.0%} of the `id`s, about")
    if not summary.has_test:
        log.info("no test records: there will be no figures before and after; name a file under `test:`")


def _warnings(summary: FileSummary) -> Iterator[str]:
    from finetune.data.bad_records import fix_for, named
    from finetune.data.control_text import control_text_lines
    from finetune.data.inspect_file import BAD_RECORDS_SHOWN

    source, split = summary.source, summary.split
    if source.columns:
        read = ", ".join(f"{theirs} as {ours}" for ours, theirs in source.columns.items())
        yield f"no form has these columns; the recipe reads {read}: correct `columns` if that is wrong"
    if source.form == "hermes":
        yield "calls stand as <tool_call> in the text; the recipe reads them as hermes does: correct `form` if wrong"
    elif source.form != "auto":
        yield f"the records fit several forms; the recipe reads them as {source.form}: correct `form` if wrong"
    if summary.num_moved_thinking:
        yield (
            f"{summary.num_moved_thinking:,} records begin an answer with thinking in tags, such as <think>: the "
            "recipe makes it the messages' `thinking` (data.think_tags=move)"
        )
    yield from control_text_lines(summary.control_text)
    if summary.unused_keys:
        yield f"not used: {_counted(summary.unused_keys)}"
    if split and not split.splits:
        yield (
            f"`{split.name}` has {_counted(split.others)}, which does not tell training from other records: all are "
            f"trained; if some must not be, write `where: {{{split.name}: ...}}` beside the path"
        )
    elif split and split.num_unnamed:
        other = f"{_counted(split.others)}, which names no split" if split.others else ""
        missing = f"no value in {split.missing:,} records" if split.missing else ""
        yield f"`{split.name}` has {' and '.join(filter(None, (other, missing)))}: the recipe leaves these records out"
    if summary.bad_records:
        outcome = "the recipe skips them (data.on_bad_record)" if summary.is_skippable else "a run will stop"
        yield f"{len(summary.bad_records):,} of {summary.num_read:,} records cannot be used: {outcome}"
        yield from named(summary.bad_records, BAD_RECORDS_SHOWN)
        yield f"to use them: {fix_for(summary.bad_records)}"


def _counted(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ({count:,})" for value, count in values.items())


def _why_no_id_split(summary: FileSummary) -> str:
    return "too few different `id`s to split by" if summary.has_ids else "the records have no `id` to split by"


def recipe_text(name: str, data: str, summary: FileSummary, model: str) -> str:
    """YAML of a recipe for a file."""
    lines = [
        "# @package _global_",
        _comment(f"# {name}: {model} on {Path(data).name} (written by `finetune recipes new`)"),
        "",
        "defaults:",
        f"  - override /model: {model}",
        "  - override /data: own",
        *([f"  - override /objective: {summary.objective}"] if summary.objective != "sft" else []),
        "",
        "seed: 0 # other seeds show how much of a gain is luck",
        "",
        "data:",
        *_source_lines(summary),
        *_length_lines(summary),
    ]
    if not summary.num_with_thinking:
        lines.append("  reasoning_effort: low # no record has thinking, so low matches them")
    if summary.num_moved_thinking:
        lines.append("  think_tags: move # answers begin with thinking in tags; it becomes `thinking`")
    if summary.bad_records and summary.is_skippable:
        counts = f"{len(summary.bad_records):,} of {summary.num_read:,}"
        lines.append(f"  on_bad_record: skip # {counts} records cannot be used")
    text = "\n".join(lines) + "\n" + _ADAPTER_AND_TRAINER
    if summary.objective != "sft":
        text = text.replace(_SUPERVISED_RATE, _PREFERENCE_RATE)
    if summary.has_validation:
        text += "\nevaluate:\n  every_steps: 50 # optimiser steps between validation losses\n"
        if summary.has_test:
            text += "  test_examples: 500 # scored before and after; fewer: faster, wider intervals\n"
        text += "\nsave:\n  every_steps: 50 # optimiser steps that a crash can cost at most\n"
        if summary.objective == "sft":
            text += "  best_metric: validation_loss # exports the best adapter; `none` exports the last\n"
    return text


def _source_lines(summary: FileSummary) -> list[str]:
    """The splits, each with a source for every value that names it: `where` compares with one."""
    keys = [f"path: {_quoted(summary.source.path)}"]
    if summary.source.columns:
        keys.append(f"columns: {_mapping(summary.source.columns)}")
    if summary.source.form != "auto":
        keys.append(f"form: {summary.source.form}")
    name, named = (summary.split.name, summary.split.splits) if summary.split else ("", {})
    lines = [] if named else ["  train:", f"    mine: {{{', '.join(keys)}}}"]
    for split, values in named.items():
        lines.append(f"  {split}:")
        for number, value in enumerate(values, start=1):
            where = f"where: {_mapping({name: value})}"
            lines.append(f"    mine{number if number > 1 else ''}: {{{', '.join([*keys, where])}}}")
    if "validation" not in named:
        if summary.id_share is not None:
            lines.append(
                f"  validation_split: {{key: id, share: {summary.id_share:g}}} # use a field whose values must "
                "not be on both sides, such as a document's"
            )
        else:
            lines.append(f"  # no validation: {_why_no_id_split(summary)}; name other sources in `validation:`")
    if "test" not in named:
        lines.append("  # no test records: add `test:` sources for figures before and after")
    return lines


def _length_lines(summary: FileSummary) -> list[str]:
    lengths = (
        f"the longest of {len(summary.lengths):,} tokenised examples has {summary.longest:,} tokens, "
        f"99 % at most {summary.length_of_most:,}"
    )
    if summary.longest > LONGEST_SEQUENCE:
        return [
            f"  max_length: {LONGEST_SEQUENCE} # {lengths}",
            "  too_long: drop # or `truncate` context; `error` stops",
        ]
    # Room for several examples in a sequence, so that packing fills it.
    wanted = max(2048, 2 ** math.ceil(math.log2(summary.longest)))
    return [f"  max_length: {wanted} # tokens in a sequence; {lengths}"]


def _mapping(pairs: Mapping[str, str]) -> str:
    return f"{{{', '.join(f'{_quoted(key)}: {_quoted(value)}' for key, value in pairs.items())}}}"


def _quoted(text: str) -> str:
    """Quote any text as a YAML scalar on one line.

    Raises:
        InputError: a recipe cannot have it: it is not Unicode, or would be read as a reference to a key.
    """
    if "${" in text:
        raise InputError(
            f"a recipe cannot name {printable(text)}", why="it would read ${ as a reference to a key", fix="rename it"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"a recipe cannot name {printable(text)}", why="the name is not UTF-8", fix="rename it"
        ) from None
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")


def _comment(text: str) -> str:
    """Text of any content as part of a comment: on one line, without control characters."""
    return printable(" ".join(text.split()))

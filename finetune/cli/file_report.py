"""What `finetune recipes new` says of a file, and of what its recipe will and will not do with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune import log
from finetune.config.schema import DataConfig

if TYPE_CHECKING:
    from finetune.data.look import FileFacts

LONGEST_ROW = 16_384
_BAD_ROWS_SHOWN = 3


def is_skippable(facts: FileFacts) -> bool:
    """Whether a run that skips the rows that cannot be used goes on without them."""
    return len(facts.bad_rows) <= DataConfig.max_skipped_ratio * facts.rows


def report_file(facts: FileFacts, path: str) -> None:
    """Say what is in a file, what of it the recipe leaves out, and what it lacks."""
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
        both_sides = "" if facts.id_share is None else ": some may stand in training and in validation"
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
        log.warning(f"the records fit several forms; the recipe reads {source.form}: correct `form` if that is wrong")
    if facts.unused:
        log.warning(f"not used: {_counted(facts.unused)}")


def _report_split(facts: FileFacts) -> None:
    split = facts.split
    if split and split.splits:
        named = ", ".join(f"{name} is {' and '.join(values)}" for name, values in split.splits.items())
        log.info(f"split by {split.name}: {named}")
        if split.others:
            log.warning(
                f"`{split.name}` has {_counted(split.others)}, which names no split: the recipe leaves these rows out"
            )
        if split.missing:
            log.warning(f"{split.missing:,} rows have no `{split.name}`: the recipe leaves them out")
    elif split:
        log.warning(
            f"`{split.name}` has {_counted(split.others)}, which does not tell training from other rows: all are "
            f"trained; if some must not be, write `where: {{{split.name}: ...}}` beside the path"
        )
    if not facts.validates:
        log.info(f"no validation rows ({facts.why_no_id_split}): nothing will show when training begins to overfit")
    elif facts.id_share is not None:
        log.info(f"validation rows: {facts.id_share:.0%} of the `id`s, about")
    if not facts.tests:
        log.info("no test rows: there will be no figures before and after; name a file under `test:`")


def _report_left_out(facts: FileFacts) -> None:
    if facts.with_turns:
        every = "data.earlier_thinking=split" if facts.with_thinking else "data.loss.turns=all"
        log.info(
            f"{facts.with_turns:,} of {facts.records:,} records have several turns: the last is trained, the others "
            f"are context; {every} trains every one"
        )
    if facts.longest > LONGEST_ROW:
        dropped = sum(length > LONGEST_ROW for length in facts.lengths)
        log.info(
            f"{dropped:,} of {len(facts.lengths):,} looked at have more than {LONGEST_ROW:,} tokens: the recipe drops "
            "such (data.too_long)"
        )
    if not facts.bad_rows:
        return
    bad = f"{len(facts.bad_rows):,} of {facts.rows:,} rows cannot be used"
    if is_skippable(facts):
        log.warning(f"{bad}: the recipe skips them (data.on_bad_record)")
    else:
        log.warning(f"{bad}: a run will stop until they are corrected")
    for row in facts.bad_rows[:_BAD_ROWS_SHOWN]:
        log.warning(f"{row.where}: {row.reason}")


def _report_labels(facts: FileFacts) -> None:
    if not facts.labelled:
        return
    if facts.labelled < facts.records:
        log.info(
            f"{facts.records - facts.labelled:,} of {facts.records:,} records have no `answer`: labels are not scored"
        )
    elif 2 <= facts.answers <= 64:
        log.info(f"{facts.answers:,} different answers: scored as labels, given test rows")
    else:
        log.info(f"{facts.answers:,} different answers: not scored as labels, which takes 2 to 64")


def _counted(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ({count:,})" for value, count in values.items())

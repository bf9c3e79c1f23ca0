"""The `data` section of a recipe: sources of records, and how records become tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from finetune.config.fields import Strict

DataForm = Literal[
    "auto", "messages", "sharegpt", "hermes", "alpaca", "prompt_completion", "text", "preference", "ranked", "labelled"
]
ReasoningEffortName = Literal["low", "medium", "high"]
ThinkTags = Literal["keep", "move", "refuse"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Strict):
    """A source of records, and which of its records to keep (docs/guide/data.md has an example of every key).

    Attributes:
        path: a JSONL, JSON, CSV, TSV or Parquet file (text also gzipped), a glob such as `parts/*.jsonl.gz`,
            a directory that `datasets` saved, or `hub://OWNER/NAME`. `shipped://legal/...` is the toolkit's own
            `data/` folder; anything else is relative to the working directory.
        columns: the toolkit's name of a key -> the source's name of it, such as `{messages: conv, answer: label}`.
        where: keep only records whose fields equal these, such as `{split: train}`.
        limit: keep at most this many records, from the source's start. None: all.
        form: layout of a record's conversation (docs/guide/data.md lists the keys of each form). `auto` recognises
            it by the record's keys, reports it, and refuses a record that fits two forms.
        weight: how often an epoch takes each of the source's examples: 2 twice, 0.5 every other epoch. Only in
            `data.train`.
        split: which split of a saved dataset directory or a hub data set.
        subset: which configuration of a hub data set that has several.
        revision: branch, tag or commit of a hub data set. None: its default branch.
        streaming: read a hub data set over the network record by record, instead of downloading it first.
    """

    path: str
    columns: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    limit: Annotated[int, Ge(1)] | None = None
    form: DataForm = "auto"
    weight: Annotated[float, Gt(0)] = 1.0
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False


@dataclass(frozen=True, kw_only=True)
class ValidationSplitConfig(Strict):
    """Validation records taken out of the training sources by hash of one field, whose equal values stay together.

    Attributes:
        key: the field, such as `contract`. None: nothing is taken.
        share: approximate share of the field's values that go to validation.
    """

    key: str | None = None
    share: Annotated[float, Gt(0), Lt(1)] = 0.05


@dataclass(frozen=True, kw_only=True)
class LossConfig(Strict):
    """Loss weights of the tokens that the assistant writes, by channel; 0 makes them context.

    The weight covers what the model itself writes of a message: header and end token as well as text. System,
    developer, user and tool messages are always context, and so is a message whose thinking was dropped: the model
    would learn to answer without thinking. Every token of plain text has weight 1.

    Attributes:
        analysis: thinking, before an answer or a tool call.
        commentary: text on the commentary channel that calls no tool, such as a preamble that the user sees.
        tool_call: calls of functions and of the builtin tools, arguments included.
        final: answers.
        turns: `last` trains what follows the last user message, `all` every assistant turn. `auto`: `all` with
            `earlier_thinking: split`, and where a record's messages have a `weight`; else `last`.
    """

    analysis: Annotated[float, Ge(0)] = 1.0
    commentary: Annotated[float, Ge(0)] = 1.0
    tool_call: Annotated[float, Ge(0)] = 1.0
    final: Annotated[float, Ge(0)] = 1.0
    turns: Literal["auto", "last", "all"] = "auto"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Strict):
    """Training, validation and test data, and how records become packed sequences of tokens.

    Attributes:
        train: named sources; their examples are trained together.
        validation: named sources for the loss measured during training. Empty: no evaluation during training.
        test: named sources for evaluation before and after. Empty: none.
        validation_split: takes validation records out of the training sources instead of naming sources for them.
        max_length: tokens of a packed sequence; `too_long` decides about longer examples.
        too_long: `error` treats a longer example as a bad record; `drop` leaves it out and counts it; `truncate` cuts
            context from the left, never trained tokens, and keeps system and developer messages where they fit.
        mix_temperature: 1 leaves the sources' shares as sizes and weights make them; above 1 evens them out (shares
            are raised to 1 / temperature), with the same number of examples per epoch.
        conversation_date: the date in harmony's system message, pinned so that tokens do not change from day to day.
            A record's own `conversation_date` wins.
        reasoning_effort: the effort named in harmony's system message. A record's own `reasoning_effort` wins.
        model_identity: the first line of harmony's system message. None: the published one ("You are ChatGPT, a large
            language model trained by OpenAI."). A record's own `model_identity` wins.
        convention: `harmony` renders as openai-harmony does, `template` as the Jinja template published with the
            weights. docs/guide/data.md lists every difference. Train with the convention that you serve with.
        tool_call_type: mark of a function call: `constrain` writes `<|constrain|>json` as the format's
            documents do, `json` plain ` json` as the template does. `auto`: as the convention's source.
        loss: which tokens are trained, with which weight.
        earlier_thinking: thinking of turns before the last. `drop` as at inference, `keep` it, or `split` a
            conversation into one example per assistant turn, each trained in the context of inference.
        think_tags: of an answer that begins with thinking in tags, such as `<think>...</think>`: `keep` trains it as
            part of the answer, with a warning; `move` makes it the message's `thinking`; `refuse` treats the record as
            one that cannot be used.
        on_bad_record: `stop` if a record cannot be used (after the sources are read to their end, so that all are
            counted), or `skip` and count them.
        max_skipped_ratio: with `skip`, a larger share of skipped records stops the run nevertheless.
        pairs: of preference records with more than two scored answers: `best_worst` makes one pair of each, `all` every
            pair whose scores differ, `listwise` compares all in the order of their scores, which must not tie.
        share_prompts: compute a preference record's prompt once, its answers side by side behind it. False: every
            answer behind its own copy, the same function in more tokens.
        pack: put several examples into one sequence (none attends to another); off: one example per sequence.
        cache: keep the tokens on disk, memory-mapped and reused as long as sources, settings and code stay the same;
            off: tokenise again and keep them in memory.
        cache_dir: directory of that cache. None: `gpt-oss-finetune` in $XDG_CACHE_HOME or ~/.cache.
    """

    train: dict[str, SourceConfig]
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    test: dict[str, SourceConfig] = field(default_factory=dict)
    validation_split: ValidationSplitConfig = field(default_factory=ValidationSplitConfig)
    max_length: Annotated[int, Ge(1)] = 4096
    too_long: Literal["error", "drop", "truncate"] = "error"
    mix_temperature: Annotated[float, Gt(0)] = 1.0
    conversation_date: str = "2025-06-28"
    reasoning_effort: ReasoningEffortName = "medium"
    model_identity: str | None = None
    convention: Literal["harmony", "template"] = "harmony"
    tool_call_type: Literal["auto", "constrain", "json"] = "auto"
    loss: LossConfig = field(default_factory=LossConfig)
    earlier_thinking: Literal["drop", "keep", "split"] = "drop"
    think_tags: ThinkTags = "keep"
    on_bad_record: Literal["stop", "skip"] = "stop"
    max_skipped_ratio: Annotated[float, Ge(0), Le(1)] = 0.05
    pairs: Literal["best_worst", "all", "listwise"] = "best_worst"
    share_prompts: bool = True
    pack: bool = True
    cache: bool = True
    cache_dir: str | None = None

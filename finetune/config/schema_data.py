"""Keys of a recipe's `data`: what is trained on, and how it becomes tokens. A part of `finetune.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

DataForm = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]
ReasoningEffortName = Literal["low", "medium", "high"]


class Strict:
    """Tells pydantic to refuse a key that the dataclass does not have."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Strict):
    """Where records come from, and what to keep of them (docs/guide/data.md has an example of every key).

    Attributes:
        path: a JSONL, JSON, CSV, TSV or Parquet file (text also gzipped), a glob such as `parts/*.jsonl.gz`,
            a directory that `datasets` saved, or `hub://OWNER/NAME`. `shipped://legal/...` is the toolkit's own
            `data/` folder; anything else is relative to the working directory.
        columns: what the toolkit calls a key -> what the source calls it, such as `{messages: conv, answer: label}`.
        where: keep only records whose fields equal these, such as `{split: train}`.
        limit: keep at most this many records, from the source's start. None: all.
        form: how a record holds its conversation (docs/guide/data.md lists the keys of each form). `auto` tells it
            from the record's keys, says what it found, and refuses a record that could be two of them.
        weight: how often an epoch takes each of the source's samples: 2 twice, 0.5 every other epoch. Only in
            `data.train`.
        split: which split of a saved dataset directory or a hub data set.
        subset: which configuration of a hub data set that has several.
        revision: branch, tag or commit of a hub data set. None: its default branch.
        streaming: read a hub data set over the network row by row, instead of downloading it first.
    """

    path: str
    columns: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    form: DataForm = "auto"
    weight: float = 1.0
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False


@dataclass(frozen=True, kw_only=True)
class ValidationSplitConfig(Strict):
    """Validation records taken out of the training sources, by hash of one field: what shares its value stays together.

    Attributes:
        key: the field, such as `contract`. None: nothing is taken.
        share: share of the field's values, about, that go to validation.
    """

    key: str | None = None
    share: float = 0.05


@dataclass(frozen=True, kw_only=True)
class LossConfig(Strict):
    """Loss weight of the tokens that the assistant writes, by what they are; 0 makes them context.

    The weight covers what the model itself writes of a message: header and end token as well as text. System,
    developer, user and tool messages are always context, and so is a message whose thinking was dropped: the model
    would learn to answer without thinking. Every token of plain text has weight 1.

    Attributes:
        analysis: thinking, before an answer or a tool call.
        commentary: text on the commentary channel that calls no tool, such as a preamble that the user sees.
        tool_call: calls of functions and of the builtin tools, arguments included.
        final: answers.
        turns: `last` trains what follows the last user message, `all` every assistant turn. `auto`: `all` with
            `earlier_thinking: split`, else `last`.
    """

    analysis: float = 1.0
    commentary: float = 1.0
    tool_call: float = 1.0
    final: float = 1.0
    turns: Literal["auto", "last", "all"] = "auto"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Strict):
    """What is trained on and how it becomes rows of tokens.

    Attributes:
        train: named sources; their samples are trained together.
        validation: named sources for the loss watched during training. Empty: no evaluation while training.
        test: named sources for evaluation before and after. Empty: none.
        validation_split: takes validation records out of the training sources instead of naming sources for them.
        max_length: tokens in a packed row; `too_long` says what becomes of a longer sample.
        too_long: `error` treats a longer sample as a bad row; `drop` leaves it out and counts it; `truncate` cuts
            context from the left, never what is trained, and keeps system and developer messages where they fit.
        mix_temperature: 1 leaves the sources' shares as sizes and weights make them; above 1 evens them out (shares
            are raised to 1 / temperature), with as many samples in an epoch as before.
        conversation_date: the date in harmony's system message, pinned so that tokens do not change from day to day.
            A record's own `conversation_date` wins.
        reasoning_effort: the effort named in harmony's system message. A record's own `reasoning_effort` wins.
        model_identity: the first line of harmony's system message. None: the published one ("You are ChatGPT, a large
            language model trained by OpenAI."). A record's own `model_identity` wins.
        convention: whose tokens: `harmony` as openai-harmony renders, `template` as the Jinja template renders that is
            published with the weights. docs/guide/data.md lists every difference. Train with what you serve with.
        tool_call_type: how a call of a function is marked: `constrain` writes `<|constrain|>json` as the format's
            documents do, `json` plain ` json` as the template does. `auto`: as the convention's source.
        loss: what is trained, and how strongly.
        earlier_thinking: thinking of turns before the last. `drop` as at inference, `keep` it, or `split` a
            conversation into one sample per assistant turn, each trained in the context that it will see.
        on_bad_record: `stop` when a row cannot be used (the sources are read to their end first, so that all are
            counted), or `skip` and count them.
        max_skipped_ratio: with `skip`, more than this share of skipped rows stops the run all the same.
        pack: put several samples into one row (none sees another); off: one sample a row.
        cache: keep the tokens on disk, memory-mapped and used again as long as sources, settings and code stay the
            same; off: make them anew and hold them in memory.
        cache_dir: where. None: `gpt-oss-finetune` in $XDG_CACHE_HOME or ~/.cache.
    """

    train: dict[str, SourceConfig]
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    test: dict[str, SourceConfig] = field(default_factory=dict)
    validation_split: ValidationSplitConfig = field(default_factory=ValidationSplitConfig)
    max_length: int = 4096
    too_long: Literal["error", "drop", "truncate"] = "error"
    mix_temperature: float = 1.0
    conversation_date: str = "2025-06-28"
    reasoning_effort: ReasoningEffortName = "medium"
    model_identity: str | None = None
    convention: Literal["harmony", "template"] = "harmony"
    tool_call_type: Literal["auto", "constrain", "json"] = "auto"
    loss: LossConfig = field(default_factory=LossConfig)
    earlier_thinking: Literal["drop", "keep", "split"] = "drop"
    on_bad_record: Literal["stop", "skip"] = "stop"
    max_skipped_ratio: float = 0.05
    pack: bool = True
    cache: bool = True
    cache_dir: str | None = None

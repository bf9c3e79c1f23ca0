"""Only context is cut, from the left, at whole messages where possible; trained tokens are never touched."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.schema import DataConfig, LossConfig, SourceConfig
from finetune.data.dataset import Split, load_split
from finetune.data.forms import parse_conversation
from finetune.data.harmony.render import Example, render_example
from finetune.data.harmony.tokenizer import harmony_encoding
from finetune.data.harmony.truncate import truncate
from finetune.data.sources import Record
from finetune.errors import InputError

CONFIG = DataConfig(train={})
TURNS = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "First question: " + "one " * 40},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Second question: " + "two " * 60},
    {"role": "assistant", "content": "Second answer."},
    {"role": "user", "content": "Third question: " + "three " * 80},
    {"role": "assistant", "thinking": "Hm.", "content": "Third answer."},
]


def example_of(messages: list[dict[str, Any]], config: DataConfig = CONFIG) -> Example:
    return render_example(Record("x", "x:1", parse_conversation({"messages": messages})), config)


def text(example: Example) -> str:
    return harmony_encoding().decode(example.ids.tolist())


def trained(example: Example) -> list[int]:
    return example.ids[example.weights > 0].tolist()


def test_examples_that_fit_are_unchanged() -> None:
    example = example_of(TURNS)
    assert truncate(example, len(example.ids)) is example


def test_earlier_turns_are_removed_first_and_whole() -> None:
    """The expected tokens are the renders of the conversation without them, by third-party code."""
    whole = example_of(TURNS)
    without_first, without_second = example_of([TURNS[0], *TURNS[3:]]), example_of([TURNS[0], *TURNS[5:]])
    for limit, expected in [
        (len(whole.ids) - 1, without_first),
        (len(without_first.ids), without_first),
        (len(without_first.ids) - 1, without_second),
        (len(without_second.ids), without_second),
    ]:
        short = truncate(whole, limit)
        assert short is not None
        assert short.ids.tolist() == expected.ids.tolist()
        assert short.weights.tolist() == expected.weights.tolist()
        assert short.channels.tolist() == expected.channels.tolist()


def test_then_the_last_question_loses_its_beginning_and_keeps_its_header() -> None:
    whole = example_of(TURNS)
    limit = len(example_of([TURNS[0], *TURNS[5:]]).ids) - 30
    short = truncate(whole, limit)
    assert short is not None and len(short.ids) == limit
    shown = text(short)
    assert "Answer in one word." in shown
    assert "<|start|>user<|message|> three three" in shown and "Third question" not in shown
    assert trained(short) == trained(whole)


def test_then_the_question_and_the_instructions_are_removed() -> None:
    whole = example_of(TURNS)
    trained_part = 3 + len(trained(whole))  # with `<|start|>assistant`... of the first trained message
    system = text(whole).split("<|end|>")[0] + "<|end|>"
    with_system = len(harmony_encoding().encode(system, allowed_special="all")) + trained_part
    short = truncate(whole, with_system)
    assert short is not None
    assert (
        text(short).startswith("<|start|>system")
        and "one word" not in text(short)
        and "<|start|>user" not in text(short)
    )
    bare = truncate(whole, trained_part)
    assert bare is not None and text(bare).startswith("<|start|>assistant<|channel|>analysis<|message|>Hm.")
    assert trained(bare) == trained(whole)


def test_a_trained_part_that_does_not_fit_is_dropped() -> None:
    whole = example_of(TURNS)
    assert truncate(whole, len(trained(whole))) is None
    every_turn = example_of(TURNS, dataclasses.replace(CONFIG, loss=LossConfig(turns="all"), earlier_thinking="keep"))
    assert truncate(every_turn, len(every_turn.ids) - 200) is None, "from the first trained message on nothing goes"
    plain = render_example(Record("x", "x:1", parse_conversation({"text": "word " * 50})), CONFIG)
    assert truncate(plain, 20) is None


def test_a_cut_never_splits_a_character() -> None:
    """Many emoji take several tokens, which decode to nothing alone."""
    question = {"role": "user", "content": "🧑🏽‍🚀𓂀𝕬🜁" * 60}
    whole = example_of([question, TURNS[-1]])
    lengths = set()
    for limit in range(150, 220):
        short = truncate(whole, limit)
        assert short is not None and limit - 4 < len(short.ids) <= limit
        assert "�" not in text(short)
        lengths.add(limit - len(short.ids))
    assert max(lengths) > 0, "some limits do fall inside a character"


def test_no_tool_result_without_its_question() -> None:
    pytest.importorskip("finetune.data.parse_messages")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "x"}}}]}
    tools = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]
    result = {"role": "tool", "name": "look", "content": "found " * 30}
    messages = [TURNS[0], TURNS[1], call, result, TURNS[2], *TURNS[5:]]
    record = Record("x", "x:1", parse_conversation({"messages": messages, "tools": tools}))
    whole = render_example(record, CONFIG)
    short = truncate(whole, len(whole.ids) - 1)
    assert short is not None
    assert "found" in text(whole) and "found" not in text(short)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(40, 500))
@settings(max_examples=60, deadline=None)
def test_properties(sizes: list[int], limit: int) -> None:
    """Fits, keeps every trained token, is a subsequence, begins with a whole message, and is as long as it can be."""
    turns = [turn for size in sizes for turn in ({"role": "user", "content": "q" + " w" * size}, TURNS[2])]
    whole = example_of([TURNS[0], *turns])
    short = truncate(whole, limit)
    if short is None:
        assert limit < 3 + len(trained(whole))
        return
    assert len(short.ids) <= limit and trained(short) == trained(whole)
    assert short.weights[0] == 0 and len(short.weights) == len(short.ids) == len(short.channels)
    assert text(short).startswith("<|start|>")
    places = iter(whole.ids.tolist())
    assert all(token in places for token in short.ids.tolist()), "a subsequence"


def split_of(tmp_path: Path, **settings: Any) -> Split:
    path = tmp_path / "rows.jsonl"
    rows = [TURNS, TURNS[5:], [TURNS[-2], {"role": "assistant", "content": "long " * 1000}]]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return load_split(DataConfig(train={"mine": SourceConfig(path=str(path))}, **settings), "train")


def left_out(split: Split) -> tuple[int, int, int]:
    stats = split.stats
    return stats.num_truncated, len(stats.dropped), len(stats.bad_records)


def test_the_three_policies(tmp_path: Path) -> None:
    limit = len(example_of(TURNS).ids) - 1
    with pytest.raises(InputError, match="2 of 3 records cannot be used"):
        split_of(tmp_path, max_length=limit)
    dropped = split_of(tmp_path, max_length=limit, too_long="drop")
    assert len(dropped.examples) == 1
    assert left_out(dropped) == (0, 2, 0)
    cut = split_of(tmp_path, max_length=limit, too_long="truncate")
    assert len(cut.examples) == 2
    assert left_out(cut) == (1, 1, 0)
    (too_long,) = cut.stats.dropped
    assert too_long.where.endswith(":3") and "the trained part alone does not fit" in too_long.reason
    assert max(len(example.ids) for example in cut.examples) <= limit
    assert all(np.count_nonzero(example.weights) for example in cut.examples)
    with pytest.raises(InputError, match=r"data\.too_long=drop drops them all"):
        split_of(tmp_path, max_length=20, too_long="drop")


def test_a_cut_right_before_a_trained_header_leaves_it_untrained() -> None:
    """With analysis as context, the final message's own `<|start|>` is trained; nothing may precede it after a cut."""
    config = dataclasses.replace(CONFIG, loss=LossConfig(analysis=0.0))
    whole = example_of([TURNS[1], {"role": "assistant", "thinking": "Hm. " * 50, "content": "Answer."}], config)
    final = len(trained(whole))
    assert trained(whole)[0] == whole.ids[0], "`<|start|>` is the first trained token"
    short = truncate(whole, final + 5)
    assert short is not None and short.ids.tolist() == trained(whole)
    assert short.weights.tolist() == [0.0] + [1.0] * (final - 1)

"""Messages and records of other libraries and APIs: read as what they mean, or refused by what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import DataConfig, LossConfig, SourceConfig
from finetune.data.checks import BadRecordError
from finetune.data.conversation import Conversation
from finetune.data.forms import parse_conversation, with_our_columns
from finetune.data.harmony.render import render_examples
from finetune.data.harmony.tokenizer import harmony_encoding
from finetune.data.sources import Record, read_records

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "w",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def parsed(*messages: Any, **record: Any) -> Conversation:
    return parse_conversation({"messages": list(messages), **record})


def refused(*messages: Any, **record: Any) -> str:
    with pytest.raises(BadRecordError) as error:
        parsed(*messages, **record)
    return error.value.reason


PLAIN = parsed(QUESTION, ANSWER)


@pytest.mark.parametrize(
    "extra",
    [
        {"thinking": ""},
        {"refusal": None, "annotations": [], "audio": None},
        {"refusal": None, "annotations": [{"type": "url_citation"}], "function_call": None, "tool_calls": []},
        {"name": "", "tool_call_id": "", "tool_calls": [], "reasoning": ""},
        {"finish_reason": "stop", "index": 0, "logprobs": None, "usage": {"total_tokens": 3}},
    ],
)
def test_keys_without_a_value_and_those_about_the_answer_count_as_absent(extra: dict[str, Any]) -> None:
    assert parsed(QUESTION, ANSWER | extra) == PLAIN


def test_the_same_thinking_twice_is_one_and_two_different_ones_are_refused() -> None:
    twice = ANSWER | {"reasoning": "Easy.", "reasoning_content": "Easy."}
    assert parsed(QUESTION, twice).messages[1].thinking == "Easy."
    assert "different text: keep one" in refused(QUESTION, twice | {"reasoning": "Hard."})


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_parts_of_text_are_joined(kind: str) -> None:
    parts = [{"type": kind, "text": "2+"}, {"type": kind, "text": "2?", "image_url": None}]
    assert parsed({"role": "user", "content": parts}, ANSWER) == PLAIN
    assert parsed({"role": "user", "content": ["2+2?"]}, {"role": "assistant", "content": [{"text": "4"}]}) == PLAIN


def test_parts_of_thinking_become_thinking() -> None:
    parts = [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "4"}]
    message = parsed(QUESTION, {"role": "assistant", "content": parts}).messages[1]
    assert (message.thinking, message.content) == ("Hm.", "4")
    assert "keep one" in refused(QUESTION, {"role": "assistant", "content": parts, "thinking": "Other."})


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "data:,"}}, "an image part (image_url), which gpt-oss cannot read"),
        ({"type": "input_audio", "input_audio": {}}, "audio part"),
        ({"type": "video"}, "a video part"),
        ({"type": "input_file"}, "a file part"),
        ({"type": "tool_use", "name": "w"}, "give calls under `tool_calls`"),
        ({"type": "tool_result"}, "give calls under `tool_calls`"),
        ({"type": "refusal", "refusal": "no"}, "refusal"),
        ({"type": "redacted_thinking", "data": "x"}, "encrypted"),
        ({"type": "new"}, "known are text"),
        (5, "known are text"),
    ],
)
def test_other_parts_are_refused_by_what_they_are(part: object, words: str) -> None:
    assert words in refused({"role": "user", "content": [{"type": "text", "text": "What?"}, part]}, ANSWER)


def test_a_refusal_is_no_answer() -> None:
    assert "refused" in refused(QUESTION, {"role": "assistant", "content": None, "refusal": "I cannot."})


def test_calls_of_older_and_other_forms_are_one_call_and_its_result() -> None:
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    ours = parsed(
        QUESTION,
        {"role": "assistant", "tool_calls": [{"function": call}]},
        {"role": "tool", "content": "21"},
        ANSWER,
        tools=[WEATHER],
    )
    legacy = parsed(
        QUESTION,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "weather", "content": "21"},
        ANSWER,
        functions=[WEATHER["function"]],
    )
    swift = parsed(
        QUESTION,
        {"role": "tool_call", "content": json.dumps(call)},
        {"role": "tool_response", "content": "21"},
        ANSWER,
        tools=json.dumps([WEATHER]),
    )
    texts = {tuple((c.recipient, c.arguments) for c in each.messages[1].tool_calls) for each in (ours, legacy, swift)}
    assert texts == {(("functions.weather", '{"city": "Oslo"}'),)}
    assert [message.role for message in swift.messages] == ["user", "assistant", "tool", "assistant"]
    both = {"role": "assistant", "function_call": call, "tool_calls": [{"function": call}]}
    assert "keep one" in refused(QUESTION, both, tools=[WEATHER])


def test_several_calls_in_messages_of_their_own_are_answered_in_order() -> None:
    calls = [{"role": "tool_call", "content": {"name": "weather", "arguments": {"city": city}}} for city in ("A", "B")]
    results = [{"role": "tool_response", "content": text} for text in ("1", "2")]
    conversation = parsed(QUESTION, *calls, *results, ANSWER, tools=[WEATHER])
    assert [call.arguments for call in conversation.messages[1].tool_calls] == ['{"city": "A"}', '{"city": "B"}']
    assert [message.content for message in conversation.messages[2:4]] == ["1", "2"]


@pytest.mark.parametrize("arguments", ["", " ", None, "{}", {}])
def test_empty_arguments_are_an_empty_object_unless_something_is_required(arguments: object) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}
    assert parsed(QUESTION, call, tools=[WEATHER]).messages[1].tool_calls[0].arguments == "{}"
    needy = json.loads(json.dumps(WEATHER))
    needy["function"]["parameters"]["required"] = ["city"]
    if arguments not in ("{}", {}):
        assert "`city` is required" in refused(QUESTION, call, tools=[needy])


def test_an_empty_id_is_none() -> None:
    calls = [{"id": "", "function": {"name": "weather", "arguments": {"city": city}}} for city in "AB"]
    reason = refused(
        QUESTION, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "tool_call_id": "", "content": "1"},
        tools=[WEATHER],
    )  # fmt: skip
    assert "2 calls wait for a result; name one with `tool_call_id`" in reason


# Weights


def trained(conversation: Conversation, **options: Any) -> list[str]:
    """The texts that are trained, by run of tokens with a weight."""
    record = Record("r", "f:1", conversation, None, {})
    texts = []
    for example in render_examples(record, DataConfig(train={}, **options)):
        run: list[int] = []
        for token, weight in zip([*example.ids.tolist(), 0], [*example.weights.tolist(), 0.0], strict=True):
            if weight:
                run.append(token)
            elif run:
                texts.append(harmony_encoding().decode(run))
                run = []
    return texts


def weighted(first: Any, second: Any, key: str = "weight") -> Conversation:
    return parsed(
        QUESTION, ANSWER | ({} if first is None else {key: first}), {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Sum."} | ({} if second is None else {key: second}),
    )  # fmt: skip


@pytest.mark.parametrize("key", ["weight", "loss"])
def test_a_weight_of_a_message_decides_what_is_trained(key: str) -> None:
    assert [("4" in text, "Sum." in text) for text in trained(weighted(None, None))] == [(False, True)]
    assert ["Sum." in text for text in trained(weighted(0, 1, key))] == [True]
    both = trained(weighted(1, True, key))
    assert len(both) == 2 and "4" in both[0] and "Sum." in both[1]
    assert ["4" in text for text in trained(weighted(1, 0, key))] == [True]
    assert trained(weighted(0, False, key)) == []
    assert len(trained(weighted(1, 1, key), loss=LossConfig(turns="last"))) == 1, "the recipe's word counts"
    split = trained(weighted(1, 0, key), earlier_thinking="split")
    assert len(split) == 1 and "4" in split[0]


def test_a_fraction_is_a_factor_of_the_channels_weight() -> None:
    record = Record("r", "f:1", weighted(0.5, 1.0), None, {})
    (example,) = render_examples(record, DataConfig(train={}, loss=LossConfig(final=0.5)))
    assert set(example.weights.tolist()) == {0.0, 0.25, 0.5}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (ANSWER | {"weight": -1}, "a number from 0 on"),
        (ANSWER | {"weight": "1"}, "a number from 0 on"),
        (ANSWER | {"weight": float("nan")}, "a number from 0 on"),
        (ANSWER | {"weight": 1, "loss": True}, "keep one"),
    ],
)
def test_bad_weights_are_refused(message: dict[str, Any], words: str) -> None:
    assert words in refused(QUESTION, message)
    assert "only the assistant's" in refused(QUESTION | {"weight": 1}, ANSWER)
    assert parsed(QUESTION | {"weight": 0}, ANSWER) == PLAIN


def test_answers_that_are_compared_have_no_weight() -> None:
    record = {
        "prompt": [QUESTION],
        "chosen": [ANSWER | {"weight": 0}],
        "rejected": [{"role": "assistant", "content": "5"}],
    }
    with pytest.raises(BadRecordError, match="cannot have"):
        parse_conversation(record)


# Records


def test_sharegpt_turns_have_weights_too() -> None:
    turns = [{"from": "human", "value": "2+2?", "weight": None}, {"from": "gpt", "value": "4", "weight": 0}]
    assert parse_conversation({"conversations": turns}).messages[1].weight == 0


def test_lima_capybara_and_dolly_are_read() -> None:
    wanted = [("user", "2+2?"), ("assistant", "4")]
    records: list[dict[str, Any]] = [
        {"conversations": ["2+2?", "4"], "source": "s"},
        {"source": "s", "conversation": [{"input": "2+2?", "output": "4"}]},
        {"instruction": "2+2?", "context": "", "response": "4", "category": "open_qa"},
    ]
    for record in records:
        messages = parse_conversation(with_our_columns(record)).messages
        assert [(message.role, message.content) for message in messages] == wanted
    dolly = with_our_columns(records[2] | {"context": "Sums."})
    assert parse_conversation(dolly).messages[0].content == "2+2?\n\nSums."
    assert with_our_columns({"conversation": [{"role": "user"}]}) == {"conversation": [{"role": "user"}]}


@pytest.mark.parametrize("record", [{"prompt": "2+2?", "completion": "4"}, {"instruction": "2+2?", "output": "4"}])
def test_thinking_and_system_can_be_columns_of_a_table(record: dict[str, Any]) -> None:
    messages = parse_conversation(record | {"thinking": "Easy.", "system": "Be brief."}).messages
    assert messages[0].content == "Be brief." and messages[-1].thinking == "Easy."
    assert parse_conversation(record | {"thinking": "", "system": ""}).messages == PLAIN.messages


HERMES = [
    {"from": "system", "value": "You call functions. <tools>[...]</tools>"},
    {"from": "human", "value": "Weather?"},
    {"from": "gpt", "value": "Look.\n<tool_call>\n{'arguments': {'city': 'Oslo'}, 'name': 'weather'}\n</tool_call>\n"
     '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'},
    {"from": "tool", "value": "<tool_response>\n21\n</tool_response>\n<tool_response>30</tool_response>"},
    {"from": "gpt", "value": "21 and 30"},
]  # fmt: skip


def test_hermes_calls_are_read_by_their_form_and_pointed_out_without_it(tmp_path: Path) -> None:
    path = tmp_path / "hermes.jsonl"
    path.write_text(json.dumps({"conversations": HERMES, "tools": json.dumps([WEATHER])}) + "\n")
    (bad,) = read_records("mine", SourceConfig(path=str(path)))
    assert "form: hermes" in bad.reason  # type: ignore[union-attr]
    (record,) = read_records("mine", SourceConfig(path=str(path), form="hermes"))
    assert isinstance(record, Record)
    user, calls, first, second, answer = record.conversation.messages
    assert (user.content, calls.content, answer.content) == ("Weather?", "Look.", "21 and 30")
    assert [call.arguments for call in calls.tool_calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']
    assert (first.content, second.content) == ("21", "30")
    broken = [*HERMES[:2], {"from": "gpt", "value": "<tool_call>weather(Oslo)</tool_call>"}]
    with pytest.raises(BadRecordError, match="not JSON"):
        parse_conversation({"conversations": broken, "tools": [WEATHER]}, "hermes")


@pytest.mark.parametrize(("key", "value"), [("images", ["a.png"]), ("image", {"path": "a.png"}), ("audios", ["a.wav"])])
def test_media_beside_the_messages_are_refused_by_that_word(key: str, value: object) -> None:
    assert f"`{key}`), which gpt-oss cannot read" in refused(QUESTION, ANSWER, **{key: value})
    assert parsed(QUESTION, ANSWER, **{key: None}) == parsed(QUESTION, ANSWER, **{key: []}) == PLAIN


def test_a_chosen_answer_may_be_a_call() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}
    record = {"prompt": [QUESTION], "chosen": [call], "rejected": [ANSWER], "tools": [WEATHER]}
    assert parse_conversation(record).answers[0].messages[0].tool_calls[0].recipient == "functions.weather"

"""Every form of a record, every fault it can have, and the conversation it becomes."""

from __future__ import annotations

import json
import random
from typing import Any, Literal

import pytest
from conversations import SCHEMA_RECORD, Maker, broken

from finetune.config.schema import DataConfig
from finetune.data.checks import BadRecordError
from finetune.data.conversation import Message, ToolCall
from finetune.data.forms import detect_form, parse_conversation
from finetune.data.harmony.render import render_examples
from finetune.data.sources import Record

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
F = {"type": "function", "function": {"name": "f", "description": "Does f.", "parameters": {"type": "object"}}}
G = {"type": "function", "function": {"name": "g_long_name"}}


def messages(*entries: object, **fields: object) -> dict[str, Any]:
    return {"messages": list(entries), **fields}


def calling(*calls: object, **fields: object) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": list(calls), **fields}


def call(name: object = "f", arguments: object = None, **fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments or {}}, **fields}


def result(content: object = "20", **fields: object) -> dict[str, object]:
    return {"role": "tool", "content": content, **fields}


def with_f(*entries: object) -> dict[str, Any]:
    return messages(USER, *entries, tools=[F])


# what is wrong: (the record, the kind it is counted as, words of the reason)
BAD: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "messages is text": ({"messages": "hello"}, "no messages", ("must be a list", "'hello'")),
    "no message": (messages(), "no messages", ("an empty list",)),
    "message is text": (messages("hello"), "not a message", ("message 1 must be an object",)),
    "unknown role": (messages(USER, {"role": "asistant"}), "unknown role", ("message 2", "did you mean assistant?")),
    "no role": (messages({"content": "4"}), "unknown role", ("message 1 has no role",)),
    "unknown key": (messages(USER, ANSWER | {"thinkng": "t"}), "unknown message key", ("did you mean thinking?",)),
    "no content": (messages(USER, {"role": "assistant"}), "content is not text", ("message 2", "not nothing")),
    "null content": (messages(USER, ANSWER | {"content": None}), "content is not text", ("message 2",)),
    "content parts": (messages({"role": "user", "content": [{}]}, ANSWER), "not text", ("known are text",)),
    "empty answer": (messages(USER, ANSWER | {"content": ""}), "empty content", ("message 2",)),
    "blank question": (messages(USER | {"content": " \n"}, ANSWER), "empty content", ("message 1",)),
    "empty alias": (messages(USER, ANSWER | {"reasoning": " "}), "empty thinking", ("leave the key out",)),
    "two aliases": (
        messages(USER, ANSWER | {"thinking": "a", "reasoning_content": "b"}),
        "two thinkings",
        ("`thinking` and `reasoning_content`",),
    ),
    "user thinks": (messages(USER | {"thinking": "t"}, ANSWER), "thinking of another role", ("from the user",)),
    "user calls": (messages(USER | {"tool_calls": [call()]}, ANSWER), "key of another role", ("`tool_calls`",)),
    "half a character": (messages(USER | {"content": "a\ud83d"}, ANSWER), "broken character", ("\\ud83d",)),
    "late system": (
        messages(USER, {"role": "system", "content": "s"}, ANSWER),
        "system message not first",
        ("message 2",),
    ),
    "developer after system": (
        messages({"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, USER, ANSWER),
        "system message not first",
        ("message 2 is from the developer",),
    ),
    "two systems": (
        messages({"role": "system", "content": "s"}, USER, ANSWER, system="another"),
        "system message not first",
        ("message 2",),
    ),
    "system is no text": (messages(USER, ANSWER, system=3), "system is not text", ("not 3",)),
    "two answers": (messages(USER, ANSWER, ANSWER), "two answers in a row", ("message 3",)),
    "ends with the user": (messages(USER, ANSWER, USER), "no answer", ("not from the user",)),
    "ends with a result": (with_f(calling(call()), result()), "no answer", ("not from the tool",)),
    "ends with commentary": (messages(USER, ANSWER | {"channel": "commentary"}), "no answer", ("is commentary",)),
    "ends with analysis": (messages(USER, ANSWER | {"channel": "analysis"}), "no answer", ("is analysis",)),
    "turn without an end": (
        messages(USER, ANSWER | {"channel": "commentary"}, USER, ANSWER),
        "no answer",
        ("message 3 is from the user",),
    ),
    "no question": (messages(ANSWER), "no question", ("no message is from the user",)),
    "unknown channel": (messages(USER, ANSWER | {"channel": "finale"}), "unknown channel", ("did you mean final?",)),
    "calls on final": (with_f(calling(call(), channel="final")), "unknown channel", ("final channel",)),
    "analysis twice": (
        messages(USER, ANSWER | {"channel": "analysis"}, ANSWER | {"thinking": "t"}),
        "two thinkings",
        ("message 3",),
    ),
    "orphan result": (with_f(result(), ANSWER), "orphan tool result", ("message 2", "no call waits")),
    "orphan after the result": (
        with_f(calling(call()), result(), result(), ANSWER),
        "orphan tool result",
        ("message 4",),
    ),
    "result with another id": (
        with_f(calling(call(id="a")), result(tool_call_id="b"), ANSWER),
        "orphan tool result",
        ("no call with id 'b'",),
    ),
    "result with another name": (
        with_f(calling(call()), result(name="g"), ANSWER),
        "orphan tool result",
        ("name 'g'",),
    ),
    "which call": (
        with_f(calling(call(), call()), result(), result(), ANSWER),
        "orphan tool result",
        ("2 calls wait", "`tool_call_id`"),
    ),
    "call without result": (with_f(calling(call()), ANSWER), "tool call without result", ("message 3", "`f`")),
    "one of two results": (
        with_f(calling(call(id="a"), call(id="b")), result(tool_call_id="b"), ANSWER),
        "tool call without result",
        ("message 4",),
    ),
    "arguments not JSON": (
        with_f(calling(call(arguments='{"x": '))),
        "bad arguments",
        ("message 2: `arguments` of `f` is not JSON",),
    ),
    "arguments encoded twice": (
        with_f(calling(call(arguments=json.dumps('{"x": 1}')))),
        "bad arguments",
        ("must be an object",),
    ),
    "arguments with NaN": (with_f(calling(call(arguments='{"x": NaN}'))), "bad arguments", ("NaN",)),
    "arguments repeat a key": (
        with_f(calling(call(arguments='{"x": 1, "x": 2}'))),
        "bad arguments",
        ("the key `x` twice",),
    ),
    "calls not a list": (with_f({"role": "assistant", "tool_calls": call()}), "bad tool call", ("a list",)),
    "call without a name": (with_f(calling(call(name=None))), "bad tool call", ("a name",)),
    "call with another key": (with_f(calling(call(argments={"x": 1}))), "bad tool call", ("did you mean arguments?",)),
    "undeclared function": (
        messages(USER, calling(call("g_long_nam")), tools=[F, G]),
        "undeclared tool",
        ("did you mean g_long_name?",),
    ),
    "no tools declared": (messages(USER, calling(call())), "undeclared tool", ("declares no `tools`",)),
    "python not declared": (with_f(calling(call("python", "1"))), "undeclared tool", ("`python`",)),
    "tools not a list": (messages(USER, ANSWER, tools={"f": 1}), "bad tools", ("a list of tools",)),
    "tools and functions": (messages(USER, ANSWER, tools=[F], functions=[G]), "bad tools", ("keep one",)),
    "tools not JSON": (messages(USER, ANSWER, tools="[{"), "bad JSON inside", ("`tools` is not JSON",)),
    "tool of another type": (messages(USER, ANSWER, tools=[F | {"type": "retrieval"}]), "bad tools", ("retrieval",)),
    "tool with a space": (messages(USER, ANSWER, tools=[{"name": "get it"}]), "bad tools", ("letters, digits",)),
    "tool twice": (messages(USER, ANSWER, tools=[F, F]), "bad tools", ("`f` twice",)),
    "unknown builtin": (messages(USER, ANSWER, builtin_tools=["brwser"]), "bad tools", ("did you mean browser?",)),
    "unknown effort": (
        messages(USER, ANSWER, reasoning_effort="hihg"),
        "unknown reasoning effort",
        ("did you mean high?",),
    ),
    "date not a date": (messages(USER, ANSWER, conversation_date="28.6.2025"), "bad conversation date", ("28.6.2025",)),
    "empty identity": (messages(USER, ANSWER, model_identity=""), "empty model_identity", ("the record",)),
    "no form": ({"question": "a", "reply": "b"}, "no messages", ("only question, reply",)),
    "two forms": (messages(USER, ANSWER, text="t"), "ambiguous form", ("`messages` or `text`", "`form`")),
    "sharegpt role": ({"conversations": [{"from": "humn", "value": "x"}]}, "unknown role", ("did you mean human?",)),
    "sharegpt with roles": ({"conversations": [USER, ANSWER]}, "not a message", ("map the column to `messages`",)),
    "alpaca input": ({"instruction": "a", "input": 3, "output": "b"}, "input is not text", ("not 3",)),
    "alpaca history": ({"instruction": "a", "output": "b", "history": ["x"]}, "bad history", ("pairs",)),
    "empty completion": ({"prompt": "a", "completion": ""}, "empty content", ("message 2",)),
    "prompt is a number": ({"prompt": 3, "completion": "b"}, "prompt is not text", ("`prompt`",)),
    "blank text": ({"text": "  "}, "empty text", ("the record has empty `text`",)),
    "endless word": ({"text": "so " + "a" * 20_001}, "word too long", ("20,000 letters",)),
    "text with tools": ({"text": "t", "tools": [F]}, "key of another form", ("no place for `tools`",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(case: str) -> None:
    raw, kind, words = BAD[case]
    with pytest.raises(BadRecordError) as caught:
        parse_conversation(raw)
    assert caught.value.kind == kind
    for word in words:
        assert word in caught.value.reason


def test_the_frames_of_the_bad_records_are_good() -> None:
    """Negative control: the records that the cases above are built from are good."""
    good = [
        messages(USER, ANSWER),
        with_f(calling(call(id="a"), call(id="b")), result(tool_call_id="b"), result(tool_call_id="a"), ANSWER),
        messages(USER, calling(call("python", "1")), builtin_tools=["python"]),
        messages(USER, ANSWER, tools=[F, G], reasoning_effort="high", conversation_date="2025-06-28"),
    ]
    for raw in good:
        assert parse_conversation(raw).messages


@pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
def test_thinking_by_any_name(key: str) -> None:
    assert parse_conversation(messages(USER, ANSWER | {key: "t"})).messages[-1].thinking == "t"


def test_analysis_may_be_a_message_of_its_own() -> None:
    separate = messages(USER, {"role": "assistant", "channel": "analysis", "content": "t"}, ANSWER)
    assert parse_conversation(separate) == parse_conversation(messages(USER, ANSWER | {"thinking": "t"}))


def test_null_keys_are_absent() -> None:
    """Parquet gives every message every key."""
    nulls = dict.fromkeys(("thinking", "tool_calls", "name", "tool_call_id", "channel"))
    row = messages(nulls | USER, nulls | ANSWER, tools=None, text=None, prompt=None, reasoning_effort=None)
    assert parse_conversation(row) == parse_conversation(messages(USER, ANSWER))


@pytest.mark.parametrize("arguments", [{"x": "é", "n": 1}, '{"x":"\\u00e9","n":1}', '{\n "x": "é", "n": 1}'])
def test_arguments_are_one_text_however_given(arguments: object) -> None:
    conversation = parse_conversation(with_f(calling(call(arguments=arguments, id="a"))))
    assert conversation.messages[-1].tool_calls == (ToolCall("functions.f", '{"x": "é", "n": 1}', "a"),)


@pytest.mark.parametrize("fields", [{}, {"name": "f"}, {"name": "functions.f"}, {"tool_call_id": "a"}])
def test_results_find_their_call(fields: dict[str, str]) -> None:
    conversation = parse_conversation(with_f(calling(call(id="a")), result({"temp": 20}, **fields), ANSWER))
    assert conversation.messages[2] == Message("tool", '{"temp": 20}', recipient="functions.f")


def test_results_of_several_calls_in_any_order() -> None:
    record = messages(
        USER,
        calling(call(id="a"), call("g_long_name", id="b"), content="One moment."),
        result("of g", tool_call_id="b"),
        result("", tool_call_id="a"),
        ANSWER,
        tools=json.dumps([F, G]),
    )
    said = parse_conversation(record).messages
    assert [message.recipient for message in said[2:4]] == ["functions.g_long_name", "functions.f"]
    assert (said[1].content, said[1].channel, said[3].content) == ("One moment.", "commentary", "")


def test_builtin_tools() -> None:
    record = messages(
        USER,
        calling(call("python", {"code": "print(1)"})),
        result("1"),
        calling(call("browser.search", {"query": "q"})),
        builtin_tools=["python", "browser"],
    )
    conversation = parse_conversation(record)
    assert conversation.tools.builtin == ("browser", "python")
    calls = [message.tool_calls[0] for message in conversation.messages if message.tool_calls]
    assert [(made.recipient, made.arguments, made.is_builtin) for made in calls] == [
        ("python", "print(1)", True),
        ("browser.search", '{"query": "q"}', True),
    ]


PLAIN = (Message("user", "q"), Message("assistant", "a"))
INSTRUCTED = (Message("system", "s"), *PLAIN)
FORMS: dict[str, tuple[dict[str, Any], str, tuple[Message, ...]]] = {
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "sharegpt",
        PLAIN,
    ),
    "sharegpt with system": (
        {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        "sharegpt",
        INSTRUCTED,
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, "alpaca", PLAIN),
    "alpaca with input": (
        {"instruction": "q", "input": "i", "output": "a"},
        "alpaca",
        (Message("user", "q\n\ni"), PLAIN[1]),
    ),
    "alpaca with history": (
        {"instruction": "q", "output": "a", "history": [["q", "a"]], "system": "s"},
        "alpaca",
        (*INSTRUCTED, *PLAIN),
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, "prompt_completion", PLAIN),
    "prompt as messages": (
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        "prompt_completion",
        INSTRUCTED,
    ),
    "prompt with system": ({"system": "s", "prompt": "q", "completion": "a"}, "prompt_completion", INSTRUCTED),
    "messages with system": (
        {"system": "s", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "messages",
        INSTRUCTED,
    ),
    "messages with the same system twice": (
        {
            "system": "s",
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "completion": "a",
        },
        "prompt_completion",
        INSTRUCTED,
    ),
    "messages as text": (
        {"messages": ' [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        "messages",
        PLAIN,
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms(case: str) -> None:
    raw, form, expected = FORMS[case]
    assert detect_form(raw) == form
    conversation = parse_conversation(raw)
    assert (conversation.form, conversation.messages) == (form, expected)
    assert parse_conversation(raw, form) == conversation  # type: ignore[arg-type]


def test_lists_as_json_text() -> None:
    """As CSV, or Parquet made from it, stores them."""
    row = {"messages": json.dumps([USER, ANSWER]), "functions": json.dumps([F]), "builtin_tools": '["python"]'}
    assert parse_conversation(row) == parse_conversation(
        messages(USER, ANSWER, tools=[F["function"]], builtin_tools=["python"])
    )
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert parse_conversation({"conversations": json.dumps(turns)}).messages == PLAIN


def test_sharegpt_tools() -> None:
    record = {
        "tools": json.dumps([{"name": "f", "description": "Does f."}]),
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "20"},
            {"from": "gpt", "value": "a"},
        ],
    }
    said = parse_conversation(record).messages
    assert said[1].tool_calls == (ToolCall("functions.f", '{"x": 1}'),)
    assert said[2] == Message("tool", "20", recipient="functions.f")


def test_the_forms_key_must_be_there_when_the_form_is_given() -> None:
    with pytest.raises(BadRecordError, match="form `alpaca` needs `instruction`"):
        parse_conversation(messages(USER, ANSWER), "alpaca")


def test_a_given_form_settles_what_is_ambiguous() -> None:
    row = messages(USER, ANSWER, text="a field of the record")
    assert parse_conversation(row, "messages").messages == parse_conversation(messages(USER, ANSWER)).messages
    assert parse_conversation({"text": "t", "prompt": "p", "completion": "c"}, "text").text == "t"


@pytest.mark.parametrize("convention", ["harmony", "template"])
def test_broken_records_are_bad_records_and_never_a_traceback(convention: Literal["harmony", "template"]) -> None:
    rng, maker = random.Random(0), Maker(10, for_template=convention == "template")
    config = DataConfig(train={}, convention=convention, earlier_thinking="split")
    good, bad = 0, set()
    for number in range(1500):
        raw = broken(SCHEMA_RECORD if number % 10 == 0 else maker.record(), rng)
        try:
            examples = render_examples(Record("x", "x:1", parse_conversation(raw)), config)
            good += all(example.num_trained_tokens for example in examples)
        except BadRecordError as error:
            bad.add(error.kind)
            assert error.reason
    assert good > 200 and len(bad) > 15, (good, bad)

"""Thousands of random conversations, token by token against openai-harmony called here, independently of the project.

What is expected is built from the raw record: harmony's own message objects, dropped thinking by a rule written anew,
and weights from each message's own render.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conversations import Maker
from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    ToolDescription,
)

from finetune.config.schema import DataConfig, LossConfig
from finetune.data.forms import parse_conversation
from finetune.data.harmony.encode import HEADER, Channel
from finetune.data.harmony.render import render_examples, render_prompt
from finetune.data.harmony.tokenizer import FIRST_CONTROL_ID, harmony_encoding
from finetune.data.sources import Record

KEEP = RenderConversationConfig(auto_drop_analysis=False)
CONFIG = DataConfig(train={})
SOME = LossConfig(analysis=0.25, commentary=0.5, tool_call=2.0, final=1.0)
RETURN, CALL, END = 200002, 200012, 200007


def record_of(raw: dict[str, Any]) -> Record:
    return Record("x", "x:1", parse_conversation(raw))


def records(seed: int, count: int) -> Iterator[dict[str, Any]]:
    maker = Maker(seed)
    for _ in range(count):
        yield maker.record()


def opening(raw: dict[str, Any]) -> list[Message]:
    effort = ReasoningEffort[raw.get("reasoning_effort", CONFIG.reasoning_effort).upper()]
    system = SystemContent.new().with_conversation_start_date(raw.get("conversation_date", CONFIG.conversation_date))
    system = system.with_reasoning_effort(effort)
    if "model_identity" in raw:
        system = system.with_model_identity(raw["model_identity"])
    for name in sorted(raw.get("builtin_tools", [])):
        system = system.with_browser_tool() if name == "browser" else system.with_python_tool()
    messages = [Message.from_role_and_content(Role.SYSTEM, system)]
    first = raw["messages"][0]
    instructed = first["role"] in ("system", "developer")
    if instructed or raw.get("tools"):
        developer = DeveloperContent.new()
        if instructed:
            developer = developer.with_instructions(first["content"])
        if raw.get("tools"):
            functions = [tool["function"] for tool in raw["tools"]]
            developer = developer.with_function_tools(
                [ToolDescription.new(f["name"], f["description"], f.get("parameters")) for f in functions]
            )
        messages.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    return messages


def harmony_messages(raw: dict[str, Any]) -> list[Message]:
    """The whole record, thinking of all turns included, as in harmony's documentation."""
    messages = opening(raw)
    recipients: dict[str, str] = {}
    for message in raw["messages"]:
        if message["role"] == "user":
            messages.append(Message.from_role_and_content(Role.USER, message["content"]))
        elif message["role"] == "tool":
            recipient = recipients[message["tool_call_id"]]
            channel = "commentary" if recipient.startswith("functions.") else "analysis"
            author = Author.new(Role.TOOL, recipient)
            result = Message.from_author_and_content(author, message["content"])
            messages.append(result.with_channel(channel).with_recipient("assistant"))
        elif message["role"] == "assistant":
            thinking = message.get("thinking", message.get("reasoning_content"))
            calls = message.get("tool_calls", [])
            said = "commentary" if calls else message.get("channel", "final")
            for channel, text in (("analysis", thinking), (said, message.get("content"))):
                if text is not None:
                    messages.append(Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel))
            for call in calls:
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                builtin = name == "python" or name.startswith("browser.")
                recipients[call["id"]] = name if builtin else f"functions.{name}"
                if name != "python":
                    value = json.loads(arguments) if isinstance(arguments, str) else arguments
                    arguments = json.dumps(value, ensure_ascii=False)
                made = Message.from_role_and_content(Role.ASSISTANT, arguments).with_recipient(recipients[call["id"]])
                made = made.with_channel("analysis" if builtin else "commentary")
                messages.append(made.with_content_type("code" if builtin else "<|constrain|>json"))
    return messages


def is_thinking(message: Message) -> bool:
    return message.author.role == Role.ASSISTANT and message.channel == "analysis" and message.recipient is None


def without_earlier_thinking(messages: list[Message]) -> list[Message]:
    users = [index for index, message in enumerate(messages) if message.author.role == Role.USER]
    finals = [index for index, message in enumerate(messages) if message.channel == "final" and index < users[-1]]
    gone = finals[-1] if finals else -1
    return [message for index, message in enumerate(messages) if index > gone or not is_thinking(message)]


def turns_of(messages: list[Message]) -> Iterator[list[Message]]:
    """The conversation up to the end of each turn, with the thinking that the model still sees in it."""
    users = [index for index, message in enumerate(messages) if message.author.role == Role.USER]
    for begin, end in zip(users, [*users[1:], len(messages)], strict=True):
        last = max(index for index in range(begin, end) if messages[index].author.role == Role.ASSISTANT)
        yield without_earlier_thinking(messages[: last + 1])


def render(messages: list[Message]) -> list[int]:
    return harmony_encoding().render_conversation_for_training(Conversation.from_messages(messages), KEEP)


def kind_of(message: Message) -> Channel:
    if message.author.role != Role.ASSISTANT:
        return Channel.CONTEXT
    if message.recipient is not None:
        return Channel.TOOL_CALL
    return {"analysis": Channel.ANALYSIS, "commentary": Channel.COMMENTARY, "final": Channel.FINAL}[
        message.channel or ""
    ]


def expected_weights(messages: list[Message], ids: list[int], loss: LossConfig) -> list[float]:
    """Weights of the last turn, from the `<|start|>` in the ids (no text encodes to it)."""
    weight = {
        Channel.CONTEXT: 0.0,
        Channel.ANALYSIS: loss.analysis,
        Channel.COMMENTARY: loss.commentary,
        Channel.TOOL_CALL: loss.tool_call,
        Channel.FINAL: loss.final,
    }
    last_user = max(index for index, message in enumerate(messages) if message.author.role == Role.USER)
    starts = [index for index, token in enumerate(ids) if token == 200006]
    assert len(starts) == len(messages)
    weights: list[float] = []
    for index, (begin, end) in enumerate(zip(starts, [*starts[1:], len(ids)], strict=True)):
        value = weight[kind_of(messages[index])] if index > last_user else 0.0
        handed = kind_of(messages[index - 1]) == Channel.CONTEXT or ids[begin - 1] == CALL
        weights += [0.0 if handed else value] * 2 + [value] * (end - begin - 2)
    return weights


def test_whole_conversations_equal_openai_harmony() -> None:
    kept = replace(CONFIG, earlier_thinking="keep")
    num_kept = 0
    for raw in records(seed=1, count=2000):
        messages = harmony_messages(raw)
        dropped = without_earlier_thinking(messages)
        (example,) = render_examples(record_of(raw), CONFIG)
        assert example.ids.tolist() == render(dropped), raw
        if len(dropped) < len(messages):
            (whole,) = render_examples(record_of(raw), kept)
            assert whole.ids.tolist() == render(messages), raw
            num_kept += 1
    assert num_kept > 500


def test_weights_follow_channels() -> None:
    config = replace(CONFIG, loss=SOME)
    for raw in records(seed=2, count=600):
        messages = without_earlier_thinking(harmony_messages(raw))
        (example,) = render_examples(record_of(raw), config)
        ids = example.ids.tolist()
        assert example.weights.tolist() == expected_weights(messages, ids, SOME), raw
        assert ids[-1] in (RETURN, CALL) and example.weights[-1] > 0
        starts = np.cumsum(example.ids == 200006) - 1
        assert [Channel(value) for value in example.channels % HEADER] == [kind_of(messages[index]) for index in starts]
        assert np.all(example.channels[example.ids >= FIRST_CONTROL_ID] >= HEADER), "control tokens are no content"


def test_each_turn_is_trained_in_its_inference_context() -> None:
    config = replace(CONFIG, earlier_thinking="split", loss=SOME)
    for raw in records(seed=3, count=600):
        examples = render_examples(record_of(raw), config)
        turns = list(turns_of(harmony_messages(raw)))
        assert len(examples) == len(turns)
        for example, messages in zip(examples, turns, strict=True):
            ids = example.ids.tolist()
            assert ids == render(messages), raw
            assert example.weights.tolist() == expected_weights(messages, ids, SOME), raw


def test_prompt_is_a_prefix_and_the_rest_parses_back() -> None:
    encoding = harmony_encoding()
    for raw in records(seed=4, count=600):
        record = record_of(raw)
        (example,) = render_examples(record, CONFIG)
        prompt = render_prompt(record, CONFIG)
        ids = example.ids.tolist()
        assert ids[: len(prompt)] == prompt
        parsed = encoding.parse_messages_from_completion_tokens(ids[len(prompt) :], Role.ASSISTANT)
        said = harmony_messages(raw)
        while said[0].author.role != Role.ASSISTANT or any(m.author.role != Role.ASSISTANT for m in said):
            said.pop(0)
        assert [m.to_dict() for m in parsed] == [m.to_dict() for m in said], raw


def test_prompts_equal_openai_harmony() -> None:
    for raw in records(seed=5, count=300):
        messages = harmony_messages(raw)
        while messages[-1].author.role == Role.ASSISTANT:
            messages.pop()
        conversation = Conversation.from_messages(without_earlier_thinking(messages))
        expected = harmony_encoding().render_conversation_for_completion(conversation, Role.ASSISTANT, KEEP)
        assert render_prompt(record_of(raw), CONFIG) == expected, raw


def test_these_checks_can_fail() -> None:
    """Negative control: openai-harmony's own dropping, another content type or another drop rule are other tokens."""
    encoding = harmony_encoding()
    differs = {"auto drop": 0, "content type": 0, "keep": 0}
    for raw in records(seed=1, count=200):
        messages = harmony_messages(raw)
        (example,) = render_examples(record_of(raw), CONFIG)
        ids = example.ids.tolist()
        differs["auto drop"] += encoding.render_conversation_for_training(Conversation.from_messages(messages)) != ids
        plain = [replace_content_type(message) for message in without_earlier_thinking(messages)]
        differs["content type"] += render(plain) != ids
        differs["keep"] += render(messages) != ids
    assert all(count > 20 for count in differs.values()), differs


def replace_content_type(message: Message) -> Message:
    return message.model_copy(update={"content_type": "json" if message.content_type else None})


@pytest.mark.slow
def test_many_more_conversations() -> None:
    """20,000 conversations; about two minutes."""
    for raw in records(seed=6, count=20_000):
        messages = harmony_messages(raw)
        (example,) = render_examples(record_of(raw), CONFIG)
        assert example.ids.tolist() == render(without_earlier_thinking(messages)), raw

"""The one form that every record is brought to: a conversation of messages and tools, or plain text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from finetune.config.schema import DataForm, ReasoningEffortName

Role = Literal["system", "developer", "user", "assistant", "tool"]
BuiltinTool = Literal["browser", "python"]

FUNCTIONS = "functions."
"""Namespace that harmony writes before the name of a declared function."""
BUILTIN_RECIPIENTS: dict[BuiltinTool, tuple[str, ...]] = {
    "browser": ("browser.search", "browser.open", "browser.find"),
    "python": ("python",),
}


@dataclass(frozen=True)
class ToolCall:
    """One call that the assistant makes.

    Attributes:
        recipient: as harmony addresses it: `functions.NAME`, `python`, `browser.search`, ...
        arguments: the call's text: JSON, or code for `python`.
        id: the name by which a result may refer to it, or None.
    """

    recipient: str
    arguments: str
    id: str | None = None

    @property
    def is_builtin(self) -> bool:
        """Whether it calls the browser or python instead of a declared function."""
        return not self.recipient.startswith(FUNCTIONS)


@dataclass(frozen=True)
class FunctionTool:
    """A function that the developer declares.

    Attributes:
        name: without a namespace.
        description: may be empty.
        schema: JSON text of the parameters' JSON schema, or None. Text, so that it can be a key of a cache.
    """

    name: str
    description: str
    schema: str | None


@dataclass(frozen=True)
class DeclaredTools:
    """The tools that the assistant may call.

    Attributes:
        functions: the record's `tools`, in its order.
        builtin: the record's `builtin_tools`, browser first.
    """

    functions: tuple[FunctionTool, ...] = ()
    builtin: tuple[BuiltinTool, ...] = ()

    @property
    def recipients(self) -> tuple[str, ...]:
        """Everything that may be called, as harmony addresses it."""
        functions = tuple(FUNCTIONS + tool.name for tool in self.functions)
        return functions + tuple(name for tool in self.builtin for name in BUILTIN_RECIPIENTS[tool])


NO_TOOLS = DeclaredTools()


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: `system` and `developer` both become harmony's developer message.
        content: plain text; text that looks like a control token stays text. Empty only beside tool calls.
        thinking: the reasoning before an assistant's answer or call (harmony's analysis channel), or None.
        channel: of an assistant's content: `final` for its answer, `commentary` for text beside its work.
        tool_calls: the calls that follow the content.
        recipient: of a tool's result: the tool that it comes from, as in `ToolCall`.
        weight: of an assistant's message: a factor of the loss weights of its tokens, 0 makes it context. None: the
            record says nothing, and `data.loss.turns` decides alone.
    """

    role: Role
    content: str
    thinking: str | None = None
    channel: Literal["commentary", "final"] = "final"
    tool_calls: tuple[ToolCall, ...] = ()
    recipient: str | None = None
    weight: float | None = None

    @property
    def is_answer(self) -> bool:
        """Whether it ends the assistant's turn with an answer."""
        return self.role == "assistant" and not self.tool_calls and self.channel == "final"


@dataclass(frozen=True)
class Answer:
    """One of several answers to the same prompt.

    Attributes:
        messages: what follows the prompt.
        score: higher is better: 1 for a chosen or desirable answer, 0 for a rejected or undesirable one, or a rating.
    """

    messages: tuple[Message, ...]
    score: float


@dataclass(frozen=True)
class Conversation:
    """The content of a record.

    Attributes:
        messages: the messages in order; empty for plain text.
        text: plain text to be continued, or None for a conversation.
        form: the form that it was read from.
        tools: the functions and builtin tools that the assistant may call.
        reasoning_effort, model_identity, conversation_date: override the recipe's if not None.
        answers: the answers of a preference record, best first; `messages` is the prompt with the first of them. Empty
            for other records.
        num_prompt: how many of `messages` all answers follow.
        has_moved_thinking: thinking was moved out of tags in a text (`data.think_tags`).
    """

    messages: tuple[Message, ...]
    text: str | None = None
    form: DataForm = "messages"
    tools: DeclaredTools = NO_TOOLS
    reasoning_effort: ReasoningEffortName | None = None
    model_identity: str | None = None
    conversation_date: str | None = None
    answers: tuple[Answer, ...] = ()
    num_prompt: int = 0
    has_moved_thinking: bool = False

    @property
    def num_characters(self) -> int:
        """Characters of all texts. A token stands for at most `LONGEST_TOKEN_BYTES` bytes of them."""
        return sum(map(len, self.texts()))

    def texts(self) -> Iterator[str]:
        """Yield every text of the record that is encoded."""
        others = (message for answer in self.answers[1:] for message in answer.messages)
        for message in (*self.messages, *others):
            yield message.content
            if message.thinking:
                yield message.thinking
            for call in message.tool_calls:
                yield call.arguments
        for tool in self.tools.functions:
            yield tool.description
            yield tool.schema or ""
        yield self.model_identity or ""
        yield self.text or ""

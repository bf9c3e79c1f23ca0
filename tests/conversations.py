"""Random records for the fuzzing tests: raw JSON, as a file would hold it, made from a seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

WORDS = [
    "the", "Contract", "shall", " ", "\n", "\n\n", "  two", "naïve", "日本語", "🙂", "x=1;", "12345", "don't", "I'LL",
    "\t", "<|end|>", "<|start|>assistant", "<|return|>", "<|im_end|>", "```py\n", "…", "a" * 40, "\\n", '"q"', "é",
    "\u00a0", "<|",
]  # fmt: skip
NAMES = ["get_weather", "f", "search-all", "Read_File2"]
SCHEMAS: list[dict[str, Any]] = [
    {"type": "string", "description": "where"},
    {"type": "string", "enum": ["low", "high"], "default": "low"},
    {"type": "number"},
    {"type": "integer", "default": 3, "description": "how many\nof them"},
    {"type": "boolean"},
    {"type": "array", "items": {"type": "string"}},
    {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "number"}}}},
    {"type": "object", "properties": {"k": {"type": "string"}, "n": {"type": "integer"}}, "required": ["n"]},
    {"type": ["string", "null"]},
    {"oneOf": [{"type": "string"}, {"type": "number", "description": "or so"}]},
    {},
]


class Maker:
    """Makes records.

    Args:
        seed: the same records for the same seed.
        for_template: only what the Jinja template can write, and no control spellings, which it would obey.
    """

    def __init__(self, seed: int, *, for_template: bool = False) -> None:
        self.rng = random.Random(seed)
        self.for_template = for_template

    def text(self) -> str:
        words = [word for word in WORDS if not (self.for_template and "<|" in word)]
        while True:
            text = self.rng.choice(["", " ", "\n"]).join(self.rng.choices(words, k=self.rng.randint(1, 8)))
            if text.strip():
                return text

    def maybe(self, share: float) -> bool:
        return self.rng.random() < share

    def tools(self) -> list[dict[str, Any]]:
        tools = []
        for name in self.rng.sample(NAMES, self.rng.randint(1, 3)):
            function: dict[str, Any] = {"name": name, "description": f"Does {name}."}
            if self.maybe(0.8):
                keys = self.rng.sample(["where", "n", "mode", "flag"], self.rng.randint(0, 4))
                properties = {key: self.rng.choice(SCHEMAS) for key in keys}
                function["parameters"] = {"type": "object", "properties": properties}
                if keys and self.maybe(0.7):
                    function["parameters"]["required"] = keys[:1]
            tools.append({"type": "function", "function": function})
        return tools

    def call(self, names: list[str], number: int) -> dict[str, Any]:
        name = self.rng.choice(names)
        arguments: Any = {"where": self.text(), "n": self.rng.choice([1, 2.5, None, True, ["é"]])}
        if name == "python":
            arguments = "print(" + repr(self.text()) + ")"
        elif self.maybe(0.3):
            arguments = json.dumps(arguments)
        return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}

    def step(self, names: list[str]) -> list[dict[str, Any]]:
        """An assistant's message with calls, and the results."""
        several = 1 if self.for_template else self.rng.choice([1, 1, 2, 3])
        calls = [self.call(names, number) for number in range(several)]
        if self.for_template:
            for call in calls:
                call["function"]["arguments"] = _as_object(call["function"]["arguments"])
        message: dict[str, Any] = {"role": "assistant", "tool_calls": calls}
        if self.maybe(0.7):
            message[self.rng.choice(["thinking"] if self.for_template else ["thinking", "reasoning_content"])] = (
                self.text()
            )
        if self.maybe(0.3) and not (self.for_template and "thinking" in message):
            message["content"] = self.text()
        results: list[dict[str, Any]] = [
            {"role": "tool", "tool_call_id": call["id"], "content": self.text()} for call in calls
        ]
        self.rng.shuffle(results)
        return [message, *results]

    def record(self) -> dict[str, Any]:
        """A record of 1 to 4 turns, with tools or without; the last turn ends in an answer or a call."""
        record: dict[str, Any] = {}
        messages: list[dict[str, Any]] = []
        names: list[str] = []
        if self.maybe(0.5):
            record["tools"] = self.tools()
            names += [tool["function"]["name"] for tool in record["tools"]]
        if self.maybe(0.3):
            record["builtin_tools"] = self.rng.choice([["python"], ["browser"], ["python", "browser"]])
            if not self.for_template:
                names += [
                    name for name in ("python", "browser.search") if name.split(".")[0] in record["builtin_tools"]
                ]
        if self.maybe(0.5):
            messages.append({"role": self.rng.choice(["system", "developer"]), "content": self.text()})
        for key, values in (
            ("reasoning_effort", ["low", "high"]),
            ("model_identity", ["You are Nobody."]),
            ("conversation_date", ["2031-01-02"]),
        ):
            if self.maybe(0.2):
                record[key] = self.rng.choice(values)
        num_turns = self.rng.choice([1, 1, 2, 3, 4])
        for turn in range(num_turns):
            messages.append({"role": "user", "content": self.text()})
            for _ in range(self.rng.choice([0, 1, 2]) if names else 0):
                messages += self.step(names)
            if turn == num_turns - 1 and messages[-1]["role"] == "tool" and self.maybe(0.3):
                while messages[-1]["role"] == "tool":
                    messages.pop()
                break
            if not self.for_template and self.maybe(0.1):
                messages.append({"role": "assistant", "channel": "commentary", "content": self.text()})
            answer = {"role": "assistant", "content": self.text()}
            messages.append(answer | ({"thinking": self.text()} if self.maybe(0.6) else {}))
        return record | {"messages": messages}


JUNK: list[Any] = [
    None, True, 0, -1, 3.5, float("nan"), 10**400, "", " ", "x", "\ud800", "[{", "{}", "functions.f", "python", [], {},
    [None], [[]], ["x"], {"a": 1}, {"role": "user"}, "assistant", "tool", "final", "analysis", "<|end|>",
]  # fmt: skip
KEYS = [
    "thinking",
    "content",
    "role",
    "channel",
    "tool_calls",
    "name",
    "zzz",
    "arguments",
    "tools",
    "text",
    "enum",
    "oneOf",
]


def broken(raw: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The same record with one value replaced by junk, one left out, one doubled, or a key too many."""
    raw = copy.deepcopy(raw)
    path = rng.choice([path for path in _paths(raw, ()) if path])
    parent: Any = raw
    for key in path[:-1]:
        parent = parent[key]
    how = rng.random()
    if how < 0.6:
        parent[path[-1]] = copy.deepcopy(rng.choice(JUNK))
    elif how < 0.8:
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.insert(path[-1], copy.deepcopy(rng.choice(parent)))
    else:
        parent[rng.choice(KEYS)] = copy.deepcopy(rng.choice(JUNK))
    return raw


def _paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in below:
        yield from _paths(child, (*path, key))


def _as_object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


SCHEMA_RECORD: dict[str, Any] = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "everything",
                "description": "Does it.\nIn two lines.",
                "parameters": {
                    "type": "object",
                    "required": ["a", "h"],
                    "properties": {
                        "a": {"type": "string"},
                        "b": {"type": "string", "enum": ["x", "y"], "default": "x"},
                        "c": {"type": "array", "items": {"type": "integer"}, "nullable": True},
                        "d": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "properties": {"p": {"type": "string"}, "q": {"type": "boolean", "nullable": True}},
                                "required": ["p"],
                            },
                        },
                        "d2": {"type": "array", "items": {"type": "object", "properties": {"p": {"type": "string"}}}},
                        "d3": {"type": "array", "items": {"type": ["object", "object"]}},
                        "d4": {"type": "array"},
                        "d5": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
                        "e": {"type": ["string", "null"]},
                        "e1": {"type": ["string"]},
                        "e2": {"type": []},
                        "f": {
                            "oneOf": [
                                {"type": "string", "description": "s", "default": "é"},
                                {"type": "number"},
                                {"type": "object", "properties": {"k": {"type": "integer"}}},
                            ],
                            "default": "z",
                        },
                        "g": {"type": "object"},
                        "h": {
                            "type": "object",
                            "properties": {"x": {"type": "number"}, "y": {"type": "object", "properties": {"z": {}}}},
                            "required": ["y"],
                        },
                        "i": {"type": "string", "nullable": True, "default": None},
                        "j": {"type": "number", "default": 1.5, "description": "one\ntwo"},
                        "k": {"type": "boolean", "default": False},
                        "l": {},
                        "m": 3,
                        "n": {"type": "string", "enum": [1, True, None]},
                        "o": {"anyOf": [{"type": "string"}], "description": "d"},
                        "items": {"type": "array", "items": {"type": "string"}, "description": ""},
                    },
                },
            },
        },
        {"type": "function", "function": {"name": "bare", "description": "x"}},
        {
            "type": "function",
            "function": {"name": "empty", "description": "x", "parameters": {"type": "object", "properties": {}}},
        },
    ],
    "messages": [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "Gone"},
    ],
}
"""Parameter schemas that the two conventions write differently, each kind once."""

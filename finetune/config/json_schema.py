"""JSON schema of recipes, with which an editor completes keys, shows their documentation and marks mistakes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter

from finetune.config.fields import Plain
from finetune.config.recipes import default_choices, options
from finetune.config.schema import RunConfig

_ATTRIBUTE = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


def recipe_schema() -> Plain:
    """Build the JSON schema (draft 2020-12) of a recipe file: every key with type, range, default and documentation.

    A recipe states only what differs, so no key is required; `defaults` chooses options of groups.
    """
    content: Plain = TypeAdapter(RunConfig).json_schema()
    definitions = content.pop("$defs")
    classes = {section.__name__: section for section in _sections(RunConfig)}
    for section in [content, *definitions.values()]:
        _adapt(section, classes[section["title"]])
    content["properties"]["defaults"] = {
        "description": "Options of groups, such as `override /model: tiny`.",
        "type": "array",
        "items": {
            "oneOf": [
                {"const": "_self_"},
                {
                    "type": "object",
                    "properties": {f"override /{group}": {"enum": options(group)} for group in default_choices()},
                    "additionalProperties": False,
                },
            ]
        },
    }
    heading = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "gpt-oss-finetune recipe"}
    return {**content, **heading, "$defs": definitions}


def _sections(kind: Any) -> Iterator[type]:
    """All dataclasses that a type is made of, itself included."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        yield kind
        parts: Any = get_type_hints(kind).values()
    else:
        parts = get_args(kind)
    for part in parts:
        yield from _sections(part)


def _adapt(section: Plain, kind: Any) -> None:
    """Add the documentation, and allow that keys are missing: files of groups or defaults set them."""
    section.pop("required", None)
    section["additionalProperties"] = False
    described = documentation(kind)
    section["description"] = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    for key, value in section["properties"].items():
        value["description"] = described.get(key, "")
        if value.pop("discriminator", None):  # the recipe's `defaults` may choose the kind
            value["anyOf"] = value.pop("oneOf")


def documentation(kind: Any) -> dict[str, str]:
    """Read what a section's docstring says about each of its keys; keys that it does not describe are left out."""
    found: dict[str, str] = {}
    _, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:")
    for match in _ATTRIBUTE.finditer(attributes):
        text = re.sub(r"\s+", " ", match[2]).strip()
        found |= dict.fromkeys(match[1].split(", "), text)
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: text for key, text in found.items() if key in names}

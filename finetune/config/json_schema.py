"""A JSON schema of recipes, so that an editor completes keys, shows what they mean and marks what is wrong."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from pydantic import TypeAdapter

from finetune.config import schema
from finetune.config.recipes import default_choices, options
from finetune.config.schema import RunConfig

_ATTRIBUTE = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file: every key with its type, default and documentation.

    A recipe states only what differs, so no key is required; `defaults` chooses options of groups.
    """
    content: dict[str, Any] = TypeAdapter(RunConfig).json_schema()
    definitions = content.pop("$defs")
    for section in [content, *definitions.values()]:
        section.pop("required", None)
        section["additionalProperties"] = False
        kind = getattr(schema, section["title"])
        described = documentation(kind)
        section["description"] = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
        for key, value in section["properties"].items():
            value["description"] = described.get(key, "")
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


def documentation(kind: Any) -> dict[str, str]:
    """What a section's docstring says of each of its keys; a key that it describes nowhere is left out."""
    found: dict[str, str] = {}
    _, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:")
    for match in _ATTRIBUTE.finditer(attributes):
        text = re.sub(r"\s+", " ", match[2]).strip()
        found |= dict.fromkeys(match[1].split(", "), text)
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: text for key, text in found.items() if key in names}

"""Parameters of declared tools: schemas of other forms read as JSON schemas, and nulls that tables write.

The renderers write the parameters of a schema of `type: object` alone. Others (xLAM's flat `{name: {type}}`, `type:
dict` or `OBJECT`, none at all) would lose every parameter without a word, so they are read as what they mean, and
whatever was rendered is compared with the names that the schema declares (`check_names_are_rendered`).

Arrow gives every record every key, so in tables, and in JSON written from them, parameters and arguments of other
records' tools stand as null. Such a null is left out; one that may be meant is kept where nothing in the record was
padded, and refused where it was, since the two cannot be told apart. A null that the tool's schema forbids is padding
in such a record; in a record that nothing was padded in it is what the record says, and stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from finetune.data.checks import BadRecordError, parse_json, shown

Schema = dict[str, Any]

_TYPES = {
    "dict": "object", "dictionary": "object", "map": "object", "struct": "object",
    "str": "string", "text": "string", "char": "string",
    "int": "integer", "long": "integer",
    "float": "number", "double": "number", "decimal": "number",
    "bool": "boolean",
    "list": "array", "tuple": "array", "set": "array", "sequence": "array",
    "none": "null", "nonetype": "null",
}  # fmt: skip
_JSON_TYPES = ("object", "string", "integer", "number", "boolean", "array", "null")
_SCHEMA_WORDS = ("type", "properties", "$ref", "anyOf", "oneOf", "allOf", "additionalProperties", "required", "$defs")
_EMPTY_SCHEMA_WORDS = (
    "type", "properties", "required", "title", "description", "additionalProperties", "strict", "$schema", "$id",
    "$defs", "definitions", "default", "examples", "anyOf", "oneOf", "allOf",
)  # fmt: skip
_PARAMETER_KEYS = ("parameters", "input_schema", "inputSchema")
# Keys of a tool that are no parameters: what it returns, and how an API treats it.
_TOOL_KEYS = (
    "type", "function", "name", "description", "strict", "returns", "return", "response", "responses", "output_schema",
    "outputSchema", "annotations", "examples", "required", "cache_control", "metadata", *_PARAMETER_KEYS,
)  # fmt: skip
_OF_ITEMS = re.compile(r"(?:list|array|sequence|set|tuple)\[(.+)\]")
_DEEPEST = 40  # nested schemas


def read_parameters(place: str, raw: object, *, is_padded: bool) -> Schema | None:
    """The JSON schema of a tool's parameters; None where there is none.

    Args:
        place: of the tool, such as "tool 2".
        raw: a schema, JSON text of one, or xLAM's flat form, {name: {type, description, default}}.
        is_padded: the record has nulls that Arrow put there.

    Raises:
        BadRecordError: it is none of these.
    """
    if isinstance(raw, str) and raw.strip():
        raw = parse_json(raw, f"{place}: `parameters`", inside=True)
    if raw is None or raw == "" or raw == {}:
        return None if raw != {} else {}
    if not isinstance(raw, Mapping):
        raise BadRecordError("bad tools", f"{place} needs a JSON schema as `parameters`, not {shown(raw)}")
    schema = _without_padding(raw, is_padded)
    if _is_flat(schema):
        schema = _from_flat(place, schema)
    plain = _plain_schema(place, schema, 0)
    if plain.get("type") not in (None, "object"):
        raise BadRecordError(
            "bad tools", f"{place}: `parameters` are of type {shown(plain['type'])}; a function takes an object"
        )
    _check_properties(place, plain)
    return plain


def parameters_of(place: str, raw: Mapping[str, Any]) -> object:
    """What a tool declares as its parameters, under OpenAI's key or under Anthropic's and MCP's; None if nothing.

    Args:
        place: of the tool, such as "tool 2".
        raw: the tool, with or without the `function` level.

    Raises:
        BadRecordError: parameters under two keys, or none but under a key that is not known.
    """
    function = raw.get("function", {})
    levels = [level for level in (function, raw) if isinstance(level, Mapping)]
    given = [level[key] for level in levels for key in _PARAMETER_KEYS if level.get(key) not in (None, "", {})]
    if len(given) > 1:
        raise BadRecordError("bad tools", f"{place} has parameters twice: keep one as `parameters`")
    if given:
        return given[0]
    for level in levels:
        for key, value in level.items():
            if key not in _TOOL_KEYS and isinstance(value, Mapping | list) and value:
                raise BadRecordError("bad tools", f"{place} has no `parameters`, but `{key}`: name it `parameters`")
    return next((level["parameters"] for level in levels if level.get("parameters") is not None), None)


def _check_properties(place: str, schema: Schema) -> None:
    """Refuse a schema that says more than "an object" without a mapping of properties: all of it would be lost."""
    properties = schema.get("properties")
    if properties is not None and not isinstance(properties, Mapping) and properties != []:
        raise BadRecordError("bad tools", f"{place} needs an object as `properties`, not {shown(properties)}")
    if properties:
        return
    is_object = schema.get("type") == "object"
    for key, value in schema.items():
        says_nothing = is_object and key != "$ref" and not (isinstance(value, Mapping | list) and value)
        if (key not in _EMPTY_SCHEMA_WORDS and not says_nothing) or (key == "required" and value):
            raise BadRecordError(
                "bad tools",
                f"{place}: `{key}` of its parameters is lost, since the format writes the `properties` of a schema of "
                "type object alone: give {type: object, properties: {NAME: {type, description}}}",
            )


def _is_flat(schema: Schema) -> bool:
    """Whether it is {name: {type, ...}}: every value describes a parameter, and no word of a schema means itself."""
    if not schema or not all(isinstance(value, Mapping) for value in schema.values()):
        return False
    if "properties" in schema and all(isinstance(value, Mapping) for value in schema["properties"].values()):
        return False
    return not any(word in schema for word in ("$defs", "definitions", "additionalProperties"))


def _from_flat(place: str, flat: Schema) -> Schema:
    """xLAM's form as a schema. A parameter is required unless its type says `optional` or it has a default."""
    required = [
        name for name, spec in flat.items() if "default" not in spec and "optional" not in str(spec.get("type")).lower()
    ]
    for name, spec in flat.items():
        if not spec.keys() & {"type", "description", "enum", *_SCHEMA_WORDS}:
            raise BadRecordError("bad tools", f"{place}: parameter `{name}` has neither a type nor a description")
    schema: Schema = {"type": "object", "properties": dict(flat)}
    return schema | ({"required": required} if required else {})


def _plain_schema(place: str, schema: Schema, depth: int) -> Schema:
    """The same schema in the same order, with JSON schema's names of types; an object where it has properties."""
    if depth > _DEEPEST:
        raise BadRecordError("bad tools", f"{place}: `parameters` nest too deeply")

    def inside(value: object) -> object:
        if isinstance(value, Mapping):
            return _plain_schema(place, dict(value), depth + 1)
        return [inside(item) for item in value] if isinstance(value, list) else value

    plain: Schema = {}
    if "type" not in schema and isinstance(schema.get("properties"), Mapping):
        plain["type"] = "object"
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, Mapping):
            plain[key] = {name: inside(spec) for name, spec in value.items()}
        elif key in ("items", "anyOf", "oneOf", "allOf", "additionalProperties", "not"):
            plain[key] = inside(value)
        elif key == "type":
            plain |= _plain_type(value, schema)
        else:
            plain[key] = value
    return plain


def _plain_type(raw: object, schema: Schema) -> Schema:
    """`type` (and `items`) for a type of any spelling; an unknown one is left as it is, and rendered as any."""
    if not isinstance(raw, str) or raw in _JSON_TYPES:
        return {"type": raw}
    word = raw.lower().split(",")[0].strip()
    if (match := re.fullmatch(r"optional\[(.+)\]", word)) is not None:
        word = match[1].strip()
    if (match := _OF_ITEMS.fullmatch(word)) is not None and "items" not in schema:
        return {"type": "array", "items": _plain_type(match[1].strip(), {})}
    word = word.split("[")[0]
    known = _TYPES.get(word, word)
    return {"type": known if known in _JSON_TYPES else raw}


# Rendered names


def check_names_are_rendered(name: str, schema: Schema | None, rendered: str) -> None:
    """Compare a declaration's text with the parameters that its schema declares.

    Args:
        name: of the tool.
        schema: its parameters.
        rendered: the text of all declarations.

    Raises:
        BadRecordError: the convention has no form for this schema, and a parameter would be lost.
    """
    start = rendered.find(f"type {name} = ")
    end = rendered.find("=> any;", start)
    own = rendered[start:end] if start >= 0 and end >= 0 else ""
    for parameter in _own_names(schema or {}):
        if not re.search(rf"(?<![\w-]){re.escape(parameter)}\??:", own):
            raise BadRecordError(
                "bad tools",
                f"parameter `{parameter}` of tool `{name}` is lost: the format writes the `properties` of a schema of "
                "type object alone",
            )


def _own_names(schema: Schema) -> Iterator[str]:
    """Names that the schema of an object declares itself, also inside `anyOf`, `oneOf` and `allOf`."""
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        yield from map(str, properties)
    for key in ("anyOf", "oneOf", "allOf"):
        for variant in schema.get(key) or ():
            if isinstance(variant, Mapping):
                yield from _own_names(dict(variant))


# Nulls


def is_padded(raw: Mapping[str, Any]) -> bool:
    """Whether a record has nulls that nobody writes by hand: Arrow's, which give every message and schema every key."""
    for key in ("messages", "conversations", "prompt", "completion", "chosen", "rejected"):
        for message in _listed(raw.get(key)):
            is_ours = isinstance(message, Mapping) and message.get("role", message.get("from")) not in (
                "assistant",
                "gpt",
            )
            if is_ours and None in message.values():
                return True
    return any(_has_null_property(tool) for key in ("tools", "functions") for tool in _listed(raw.get(key)))


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _has_null_property(value: object) -> bool:
    if isinstance(value, Mapping):
        properties = value.get("properties")
        if isinstance(properties, Mapping) and None in properties.values():
            return True
        return any(map(_has_null_property, value.values()))
    return isinstance(value, list) and any(map(_has_null_property, value))


def _without_padding(schema: Mapping[str, Any], is_padded: bool) -> Schema:
    """A schema without nulls: none of its keywords takes one, but for a `default` or `const` that nobody padded."""
    kept: Schema = {}
    for key, value in schema.items():
        if value is None and (is_padded or key not in ("default", "const")):
            continue
        if isinstance(value, Mapping):
            kept[str(key)] = _without_padding(value, is_padded)
        elif isinstance(value, list) and key != "enum":
            kept[str(key)] = [_without_padding(v, is_padded) if isinstance(v, Mapping) else v for v in value]
        else:
            kept[str(key)] = value
    return kept


def without_padding_nulls(what: str, arguments: Schema, schema: Schema | None) -> Schema:
    """Arguments of a padded record without the nulls that their schema neither allows nor requires.

    Args:
        what: the call's arguments, for messages.
        arguments: as the record has them.
        schema: of the tool's parameters; None if it declares none.

    Raises:
        BadRecordError: a null that may be meant: the schema allows it, or says nothing, and does not
            require the key.
    """
    properties = (schema or {}).get("properties")
    declared: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
    required = (schema or {}).get("required") or ()
    without_nulls = partial(without_padding_nulls, what)
    kept: Schema = {}
    for key, value in arguments.items():
        spec = declared.get(key)
        inner = spec if isinstance(spec, Mapping) else {}
        if isinstance(value, Mapping):
            kept[key] = without_nulls(dict(value), dict(inner) if inner.get("properties") else None)
        elif isinstance(value, list):
            items = inner.get("items")
            of_items = dict(items) if isinstance(items, Mapping) and items.get("properties") else None
            kept[key] = [without_nulls(dict(v), of_items) if isinstance(v, Mapping) else v for v in value]
        elif value is not None or key in required:
            kept[key] = value
        elif not isinstance(properties, Mapping) or _allows_null(inner):
            raise BadRecordError(
                "null that may be padding",
                f"{what}: `{key}` is null, which may be meant or may be what a table writes for an argument of another "
                "record; store `arguments` as JSON text, or leave the key out",
            )
    return kept


def _allows_null(spec: Mapping[str, Any]) -> bool:
    kinds = spec.get("type")
    named = kinds if isinstance(kinds, list) else [kinds]
    variants = [v for key in ("anyOf", "oneOf") for v in spec.get(key) or () if isinstance(v, Mapping)]
    return "null" in named or bool(spec.get("nullable")) or any(map(_allows_null, variants))

"""Schemas moved into another one, tidied, and searched for the part that fails."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from turboquant_local.engine.grammar import check_schema
from turboquant_local.engine.json_schema import prepared
from turboquant_local.errors import GenerationOptionError

STRING = {"type": "string"}


def test_references_move_and_everything_else_stays() -> None:
    schema = {
        "$id": "https://example.org/x",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"$ref": {"const": "#/$defs/a"}, "a": {"$ref": "#/$defs/a"}, "self": {"$ref": "#"}},
        "required": ["a"],
        "default": {"$ref": "#"},
        "additionalProperties": True,
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "uniqueItems": False}, "b": {"enum": [1]}},
    }
    before = json.dumps(schema)
    moved = prepared(schema, "#/$defs/here")
    assert json.dumps(schema) == before
    assert moved == {
        "type": "object",
        "properties": {
            "$ref": {"const": "#/$defs/a"},
            "a": {"$ref": "#/$defs/here/$defs/a"},
            "self": {"$ref": "#/$defs/here"},
        },
        "required": ["a"],
        "default": {"$ref": "#"},
        "additionalProperties": True,
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/here/$defs/b"}}, "b": {"enum": [1]}},
    }
    # In its new place it means the same.
    for value in ({"a": [1]}, {"a": [2]}, {"a": [1], "self": {"a": []}}, {"a": [], "self": {}}):
        outer = {"$ref": "#/$defs/here", "$defs": {"here": moved}}
        assert Draft202012Validator(outer).is_valid(value) == Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {"a": STRING}}, True),
        ({"properties": {}}, True),
        ({"type": "object"}, False),
        ({"properties": {"a": STRING}, "additionalProperties": {"type": "null"}}, False),
        ({"properties": {"a": STRING}, "required": ["b"]}, False),
        ({"properties": {"a": STRING}, "minProperties": 1}, False),
        ({"properties": {"a": STRING}, "patternProperties": {"^x": STRING}}, False),
        # Both must hold at once: closing one would leave no room for the other.
        ({"properties": {"a": STRING}, "anyOf": [{"required": ["b"]}]}, False),
        ({"allOf": [{"properties": {"a": STRING}}, {"properties": {"b": STRING}}]}, False),
        ({"allOf": [{"properties": {"a": STRING}}]}, True),
    ],
)
def test_an_object_that_lists_its_properties_gets_no_others(schema: dict[str, Any], closed: bool) -> None:
    inner = {"type": "array", "items": schema}
    written = json.dumps(prepared(inner))
    assert ('"additionalProperties": false' in written) == closed
    assert '"additionalProperties": false' not in json.dumps(prepared(inner, may_close=False))


@pytest.mark.parametrize(
    ("schema", "pointer", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "/uniqueItems", "uniqueItems"),
        ({"type": "array", "contains": STRING}, "/contains", "contains"),
        ({"properties": {"a/b": {"items": {"not": STRING}}}}, "/properties/a~1b/items/not", "not"),
        ({"anyOf": [STRING, {"type": "string", "format": "zip"}]}, "/anyOf/1/format", "Unknown format: zip"),
        ({"type": "string", "pattern": "(?=a)b"}, "/pattern", "look-around"),
        (
            {"properties": {"x": {"$ref": "#/$defs/é %"}}, "$defs": {"é %": {"propertyNames": {}}}},
            "/$defs/é %/propertyNames",
            "",
        ),
        ({"properties": {"x": {"if": STRING, "then": {}}}}, "/properties/x", '["if", "then"]'),
        ({"properties": {"x": {"$ref": "#/$defs/none"}}}, "/properties/x/$ref", "does not exist"),
        ({"properties": {"a": STRING, "x": {"$ref": "https://x.org/s"}}}, "/properties/x/$ref", "is outside"),
        ({"properties": {"x": {"type": "banana"}}}, "/properties/x/type", "Invalid type"),
        ({"properties": {"x": 3}}, "/properties/x", "schema must be"),
        ({"additionalProperties": STRING, "minProperties": 2}, "/minProperties", "the same property twice"),
        ({"oneOf": [{"properties": {"a": STRING}}, {"properties": {"b": STRING}}]}, "/oneOf", "oneOf"),
        ({"type": "object", "required": "a"}, "/required", "required"),
        (False, "its root", "schema is false"),
    ],
)
def test_a_schema_that_cannot_be_expressed_is_refused_by_its_part(schema: Any, pointer: str, reason: str) -> None:
    with pytest.raises(GenerationOptionError) as error:
        check_schema(schema, "here")
    message = str(error.value)
    assert message.startswith(f"here, at {pointer!r}: a grammar cannot express this (")
    assert reason in message
    assert "leave it out and check it" in message


def test_recursion_ends() -> None:
    tree = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}
    check_schema(tree, "here")
    tree["$defs"]["t"]["uniqueItems"] = True  # type: ignore[index]
    with pytest.raises(GenerationOptionError, match="at '/\\$defs/t/uniqueItems'"):
        check_schema(tree, "here")

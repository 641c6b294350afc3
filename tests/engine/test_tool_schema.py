"""Tools are checked part by part before a template sees them."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import pytest

from turboquant_local.engine.tool_schema import tool_dicts
from turboquant_local.engine.types import Tool
from turboquant_local.errors import ToolSchemaError

NESTED: dict[str, Any] = {
    "type": "object",
    "description": "A search.",
    "properties": {
        "query": {"type": "string", "minLength": 1, "default": "x"},
        "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        "kind": {"enum": ["a", "b"]},
        "tags": {"type": ["array", "null"], "items": {"type": "string"}},
        "pair": {"type": "array", "items": [{"type": "string"}, {"type": "number"}]},
        "place": {"$ref": "#/$defs/Place"},
        "anything": True,
        "type": {"type": "string"},
        "required": {"type": "boolean"},
    },
    "required": ["query", "type"],
    "additionalProperties": False,
    "$defs": {"Place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}


def tool(parameters: Any, name: str = "search") -> Tool:
    return Tool(name, "Finds things.", parameters)


def test_tools_become_openai_functions() -> None:
    (made,) = tool_dicts([tool(NESTED)])
    assert made == {
        "type": "function",
        "function": {"name": "search", "description": "Finds things.", "parameters": NESTED},
    }


def test_any_mapping_becomes_plain_json() -> None:
    frozen = MappingProxyType({"type": "object", "properties": MappingProxyType({"a": {"enum": ("x", "y")}})})
    (made,) = tool_dicts([tool(frozen)])
    assert json.loads(json.dumps(made))["function"]["parameters"]["properties"] == {"a": {"enum": ["x", "y"]}}


@pytest.mark.parametrize("name", ["a", "get_weather", "mcp.server/tool-1", "wetter_für"])
def test_good_names(name: str) -> None:
    assert tool_dicts([tool(NESTED, name)])[0]["function"]["name"] == name


@pytest.mark.parametrize("name", ["", " ", "two words", 'qu"ote', "a<b>", "{a}", "a[0]", "a\n", None, 3])
def test_bad_names(name: Any) -> None:
    with pytest.raises(ToolSchemaError, match=r"tools\[1\].name=.*expected a name"):
        tool_dicts([tool(NESTED), tool(NESTED, name)])


def test_a_name_given_twice() -> None:
    with pytest.raises(ToolSchemaError, match=r"tools\[1\].name='search': given twice"):
        tool_dicts([tool(NESTED), tool(NESTED)])


def cyclic() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    schema["properties"]["self"] = schema
    return schema


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        (None, "parameters=None: expected a JSON schema"),
        ("object", "parameters='object'"),
        ({}, "parameters.type=None: expected 'object'"),
        ({"type": "string"}, "parameters.type='string': expected 'object'"),
        ({"type": "object", "properties": ["city"]}, r"parameters.properties: expected an object"),
        ({"type": "object", "properties": {"city": "string"}}, "parameters.properties.city: expected a JSON schema"),
        ({"type": "object", "properties": {"city": {"type": "str"}}}, "parameters.properties.city.type: .*'str'"),
        ({"type": "object", "properties": {"city": {"type": ["string", 1]}}}, "parameters.properties.city.type"),
        ({"type": "object", "properties": {"city": {"type": []}}}, "parameters.properties.city.type"),
        ({"type": "object", "properties": {"city": {"enum": "a"}}}, "parameters.properties.city.enum: expected a list"),
        (
            {"type": "object", "properties": {"c": {"type": "array", "items": "x"}}},
            "parameters.properties.c.items: expected a JSON",
        ),
        ({"type": "object", "properties": {"c": {"anyOf": []}}}, r"parameters.properties.c.anyOf: expected a list"),
        (
            {"type": "object", "properties": {"c": {"anyOf": [{}, {"type": 1}]}}},
            r"parameters.properties.c.anyOf\[1\].type",
        ),
        ({"type": "object", "properties": {}, "required": "city"}, "parameters.required: expected a list"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "parameters.required: 'b' is not among .*a"),
        ({"type": "object", "required": ["b"]}, "parameters.required: 'b' is not among the properties .none"),
        ({"type": "object", "$defs": {"P": {"type": "objct"}}}, r"parameters.\$defs.P.type"),
        ({"type": "object", "additionalProperties": 1}, "parameters.additionalProperties"),
        ({"type": "object", "properties": {"a": {"default": object()}}}, "parameters: not plain JSON"),
        ({"type": "object", "properties": {"a": {"default": float("nan")}}}, "parameters: not plain JSON"),
        ({"type": "object", "properties": {3: {}}}, "parameters: not plain JSON values .the key 3"),
        (cyclic(), "parameters: not plain JSON"),
    ],
)
def test_bad_parameters(parameters: Any, found: str) -> None:
    with pytest.raises(ToolSchemaError, match=f"tool 'search', {found}"):
        tool_dicts([tool(parameters)])

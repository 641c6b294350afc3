"""Checks the tools of a request before they reach a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from turboquant_local.engine.types import Tool
from turboquant_local.errors import ToolSchemaError

# A name ends up inside JSON strings and tags that the model writes back, so it may hold nothing that ends them.
_NAME: Final = re.compile(r"[^\s\"'`<>{}\[\]()\\,;=]+")
_TYPES: Final = ("string", "number", "integer", "boolean", "object", "array", "null")
_SCHEMA: Final = ("additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_SCHEMA_MAP: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LIST: Final = ("anyOf", "oneOf", "allOf", "prefixItems")


def tool_dicts(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as OpenAI function dicts of plain JSON values, which is what chat templates read.

    Raises:
        ToolSchemaError: Something that is no tool, an empty or ill-formed name, a name given twice, or parameters that
            are no JSON schema of type "object"; the message names the tool and the part.
    """
    dicts: list[dict[str, Any]] = []
    seen: set[str] = set()
    for position, tool in enumerate(tools):
        if not isinstance(tool, Tool):
            raise ToolSchemaError(f"tools[{position}]={tool!r}: expected Tool(name, description, parameters)")
        if not isinstance(tool.name, str) or not _NAME.fullmatch(tool.name):
            raise ToolSchemaError(
                f"tools[{position}].name={tool.name!r}: expected a name without spaces, quotes or brackets; "
                "use letters, digits, '_', '-' and '.'"
            )
        if tool.name in seen:
            raise ToolSchemaError(f"tools[{position}].name={tool.name!r}: given twice; give each tool its own name")
        seen.add(tool.name)
        function = {"name": tool.name, "description": tool.description, "parameters": _checked(tool)}
        dicts.append({"type": "function", "function": function})
    return dicts


def _checked(tool: Tool) -> dict[str, Any]:
    if not isinstance(tool.parameters, Mapping):
        raise ToolSchemaError(
            f"tool {tool.name!r}, parameters={tool.parameters!r}: expected a JSON schema as a mapping; "
            'a tool without arguments takes {"type": "object", "properties": {}}'
        )
    if tool.parameters.get("type") != "object":
        raise ToolSchemaError(
            f"tool {tool.name!r}, parameters.type={tool.parameters.get('type')!r}: expected 'object'; wrap the "
            'arguments as {"type": "object", "properties": {...}}'
        )
    try:
        parameters: dict[str, Any] = _plain(tool.parameters)
        json.dumps(parameters, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolSchemaError(f"tool {tool.name!r}, parameters: not plain JSON values ({error})") from error
    for part, fault in _faults(parameters, "parameters"):
        raise ToolSchemaError(f"tool {tool.name!r}, {part}: {fault}")
    return parameters


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not a string")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _faults(schema: object, part: str) -> Iterator[tuple[str, str]]:
    """Yields (part, fault) for what JSON Schema does not allow: keywords with a value of the wrong form."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        yield part, f"expected a JSON schema (an object), got {schema!r}"
        return
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not types or any(name not in _TYPES for name in types):
            yield f"{part}.type", f"expected one of {', '.join(_TYPES)} or a list of them, got {schema['type']!r}"
    if "enum" in schema and not isinstance(schema["enum"], list):
        yield f"{part}.enum", f"expected a list of values, got {schema['enum']!r}"
    yield from _required_faults(schema, part)
    for keyword in _SCHEMA_MAP:
        if keyword not in schema:
            continue
        if not isinstance(schema[keyword], dict):
            yield f"{part}.{keyword}", f"expected an object of JSON schemas by name, got {schema[keyword]!r}"
            continue
        for name, nested in schema[keyword].items():
            yield from _faults(nested, f"{part}.{keyword}.{name}")
    for keyword in _SCHEMA_LIST:
        if keyword not in schema:
            continue
        if not isinstance(schema[keyword], list) or not schema[keyword]:
            yield f"{part}.{keyword}", f"expected a list of JSON schemas, got {schema[keyword]!r}"
            continue
        for index, nested in enumerate(schema[keyword]):
            yield from _faults(nested, f"{part}.{keyword}[{index}]")
    for keyword in (*_SCHEMA, "items"):
        if keyword not in schema:
            continue
        # Drafts before 2020-12 wrote tuples as a list under "items".
        several = keyword == "items" and isinstance(schema[keyword], list)
        for nested in schema[keyword] if several else [schema[keyword]]:
            yield from _faults(nested, f"{part}.{keyword}")


def _required_faults(schema: dict[str, Any], part: str) -> Iterator[tuple[str, str]]:
    if "required" not in schema:
        return
    required = schema["required"]
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        yield f"{part}.required", f"expected a list of property names, got {required!r}"
        return
    properties = schema.get("properties", {})
    if schema.get("type") == "object" and isinstance(properties, dict) and "patternProperties" not in schema:
        unknown = [name for name in required if name not in properties]
        if unknown:
            yield f"{part}.required", f"{unknown[0]!r} is not among the properties ({', '.join(properties) or 'none'})"

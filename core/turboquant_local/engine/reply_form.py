"""What form a reply must have, read from `response_format`, `tool_choice` and the tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from turboquant_local.engine.types import GenerationOptions, Tool
from turboquant_local.errors import GenerationOptionError, did_you_mean

_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}
_WAY_OUT: Final = (
    'expected {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'
)


@dataclass(frozen=True)
class ReplyForm:
    """The form of a reply that is not free: a call of one of these tools, or JSON of this schema.

    Attributes:
        tools: Tools that may be called; none if the reply must be text.
        schema: JSON schema of the text; None if the reply must be a call.
        several_calls: Whether more than one call may follow each other.
    """

    tools: tuple[Tool, ...]
    schema: Any
    several_calls: bool


def offered_tools(options: GenerationOptions, tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """The tools that the model is told of: none with `tool_choice="none"`."""
    return () if options.tool_choice == "none" else tuple(tools)


def reply_form(options: GenerationOptions, tools: Sequence[Tool]) -> ReplyForm | None:
    """The form that options and offered tools ask for; None if the reply is free.

    Raises:
        GenerationOptionError: A call is asked for that no tool can answer.
    """
    choice = options.tool_choice
    several = options.parallel_tool_calls is not False
    if choice in (None, "auto", "none"):
        schema = response_schema(options.response_format)
        return None if schema is None else ReplyForm(tuple(tools), schema, several)
    if not tools:
        raise GenerationOptionError(f"tool_choice={choice!r}: there are no tools to call; pass tools, or leave it out")
    if choice == "required":
        return ReplyForm(tuple(tools), None, several)
    named = tuple(tool for tool in tools if tool.name == choice)
    if not named:
        names = [tool.name for tool in tools]
        hint = did_you_mean(choice, names, "; did you mean {!r}?")
        raise GenerationOptionError(
            f"tool_choice={choice!r}: expected 'auto', 'none', 'required' or the name of a tool "
            f"({', '.join(map(repr, names))}){hint}"
        )
    return ReplyForm(named, None, several_calls=False)


def response_schema(response_format: Mapping[str, Any] | None) -> Any:
    """The JSON schema that `response_format` asks for; None if it asks for nothing.

    Raises:
        GenerationOptionError: It is not written as OpenAI writes it, or the schema is no plain JSON.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise GenerationOptionError(f"response_format={response_format!r}: {_WAY_OUT}")
    extra = sorted(response_format.keys() - {"type", "json_schema" if kind == "json_schema" else "type"})
    if extra:
        raise GenerationOptionError(f"response_format[{extra[0]!r}]: not known beside type={kind!r}; {_WAY_OUT}")
    if kind != "json_schema":
        return None if kind == "text" else _ANY_OBJECT
    wrapper = response_format.get("json_schema")
    if not isinstance(wrapper, Mapping) or not isinstance(wrapper.get("schema"), (Mapping, bool)):
        raise GenerationOptionError(
            f"response_format['json_schema']={wrapper!r}: expected the schema inside, as "
            '{"name": "answer", "schema": {"type": "object", ...}}'
        )
    return plain_schema(wrapper["schema"], "response_format['json_schema']['schema']")


def plain_schema(schema: Any, where: str) -> Any:
    """A copy of a schema, in plain JSON values.

    Raises:
        GenerationOptionError: It holds something that is none.
    """
    try:
        return json.loads(json.dumps(schema, allow_nan=False, default=_as_dict))
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationOptionError(
            f"{where}: not plain JSON values ({error}); use dict, list, str and numbers"
        ) from error


def _as_dict(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} is of type {type(value).__name__}")

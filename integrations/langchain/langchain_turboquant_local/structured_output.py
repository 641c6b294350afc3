"""Replies that fit a schema: the model bound to it, and the parser behind."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from operator import itemgetter
from typing import Any, Final, Literal, cast, get_args

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from turboquant_local.errors import ConfigError

Method = Literal["function_calling", "json_schema", "json_mode"]
METHODS: Final = get_args(Method)

_ENDED_BY: Final[Mapping[str, str]] = {
    "length": "max_tokens cut it off; allow more",
    "tool_calls": "it calls a tool instead; bind no tools beside the schema",
}
"""Why a reply holds no whole object, and the way out, by its finish reason."""

Schema = dict[str, Any] | type
"""A pydantic class (v2 or v1), a TypedDict, a JSON schema, or a function or tool in OpenAI's form."""


def structured_model(
    model: BaseChatModel,
    schema: Schema | None,
    *,
    method: Method,
    include_raw: bool,
    strict: bool | None,
    **kwargs: Any,
) -> Runnable[LanguageModelInput, Any]:
    """Bind a model to a schema and parse what it answers; see `ChatTurboQuantLocal.with_structured_output`.

    Raises:
        ConfigError: An unknown method, or no schema where the method needs one.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if schema is None and method != "json_mode":
        raise ConfigError(f"schema=None: method={method!r} needs a schema; method='json_mode' takes any JSON object")
    parsed_as: type | None = cast(type, schema) if is_basemodel_subclass(schema) else None  # type: ignore[arg-type]
    traced = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
    bound: Runnable[LanguageModelInput, Any]
    parser: Runnable[Any, Any]
    if method == "function_calling":
        assert schema is not None
        name = convert_to_openai_tool(schema)["function"]["name"]
        bound = model.bind_tools(
            [schema],
            tool_choice=name,
            strict=strict,
            parallel_tool_calls=False,
            ls_structured_output_format=traced,
            **kwargs,
        )
        parser = (
            PydanticToolsParser(tools=[parsed_as], first_tool_only=True)
            if parsed_as is not None
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    else:
        form = _response_format(schema) if schema is not None else {"type": "json_object"}
        bound = model.bind(response_format=form, ls_structured_output_format=traced, **kwargs)
        parser = PydanticOutputParser(pydantic_object=parsed_as) if parsed_as is not None else JsonOutputParser()
    parser = _whole(is_call=method == "function_calling") | parser
    return _with_raw(bound, parser) if include_raw else bound | parser


def _whole(*, is_call: bool) -> Runnable[Any, Any]:
    """Let a message through, in chunks or not, and raise behind its end if the object in it is not whole.

    LangChain's parsers complete what breaks off, so that an age of 42 could silently become one of 4.
    """

    def check(parts: list[AIMessage]) -> None:
        text = "".join(part.text for part in parts)
        if not (any(part.tool_calls for part in parts) if is_call else _is_json(text)):
            why = _ENDED_BY.get(
                parts[-1].response_metadata.get("finish_reason", ""), "a string of stop ended it; leave that out"
            )
            raise OutputParserException(f"the reply ends before its object is whole: {why}", llm_output=text)

    def passed(messages: Iterator[AIMessage]) -> Iterator[AIMessage]:
        parts = []
        for message in messages:
            parts.append(message)
            yield message
        check(parts)

    async def apassed(messages: AsyncIterator[AIMessage]) -> AsyncIterator[AIMessage]:
        parts = []
        async for message in messages:
            parts.append(message)
            yield message
        check(parts)

    return RunnableGenerator(passed, apassed)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _response_format(schema: Schema) -> dict[str, Any]:
    """OpenAI's words for "a JSON object that fits this schema"."""
    json_schema = _json_schema(schema)
    return {
        "type": "json_schema",
        "json_schema": {"name": json_schema.get("title") or "response", "schema": json_schema, "strict": True},
    }


def _json_schema(schema: Schema) -> dict[str, Any]:
    # Classes of pydantic print their own schema, with references kept; LangChain's conversion would unfold them.
    for printer in ("model_json_schema", "schema"):
        if isinstance(schema, type) and is_basemodel_subclass(schema) and hasattr(schema, printer):
            return dict(getattr(schema, printer)())
    if isinstance(schema, Mapping) and not {"function", "parameters", "input_schema"} & schema.keys():
        return dict(schema)
    return convert_to_json_schema(schema)


def _with_raw(
    bound: Runnable[LanguageModelInput, Any], parser: Runnable[Any, Any]
) -> Runnable[LanguageModelInput, Any]:
    """Answer with `{"raw": message, "parsed": ..., "parsing_error": ...}`, where an error is returned, not raised."""
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")

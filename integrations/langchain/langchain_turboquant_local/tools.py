"""LangChain's tools and tool choices as the engine's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from turboquant_local.engine import types as engine
from turboquant_local.errors import GenerationOptionError, ToolSchemaError

ToolLike = Mapping[str, Any] | type | Callable[..., Any] | BaseTool
"""What LangChain takes as a tool: a tool, a function, a pydantic class, a TypedDict, or a dict in a provider's form."""

_MODES: Final[Mapping[str, str]] = {"auto": "auto", "none": "none", "any": "required", "required": "required"}
"""LangChain's and OpenAI's words for a tool choice, with the engine's."""


def to_openai_tools(tools: Sequence[ToolLike], *, strict: bool | None = None) -> list[dict[str, Any]]:
    """Convert tools to OpenAI's dicts, which is how LangChain binds and traces them.

    Args:
        tools: The tools.
        strict: Put into the dicts as OpenAI has it: no properties but those named.

    Raises:
        ToolSchemaError: A tool that runs at a provider, which no local model has.
    """
    converted = [dict(convert_to_openai_tool(tool, strict=strict)) for tool in tools]
    for position, tool in enumerate(converted):
        if not isinstance(tool.get("function"), Mapping):
            raise ToolSchemaError(
                f"tools[{position}]: {tool.get('type')!r} runs at its provider; expected a function, a tool, a class "
                "or a dict with a JSON schema"
            )
    return converted


def to_engine_tools(tools: Sequence[ToolLike], *, strict: bool | None = None) -> tuple[engine.Tool, ...]:
    """Convert tools; their schemas are checked by the engine, which knows what a template can print."""
    functions = [tool["function"] for tool in to_openai_tools(tools, strict=strict)]
    return tuple(
        engine.Tool(
            function["name"],
            function.get("description") or "",
            function.get("parameters") or {"type": "object", "properties": {}},
        )
        for function in functions
    )


def to_engine_tool_choice(choice: object, names: Sequence[str]) -> str | None:
    """Say a tool choice in the engine's words: None, "auto", "none", "required", or a tool's name.

    Args:
        choice: None, "auto", "none", "any", "required", True (as "any"), a tool's name, or OpenAI's
            `{"type": "function", "function": {"name": ...}}`.
        names: Names of the tools that are bound.

    Raises:
        GenerationOptionError: Something else, a name that is not bound, or a call forced without any tool.
    """
    if choice is None:
        return None
    wanted = choice
    if isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
        wanted = choice["function"].get("name")
    elif choice is True:
        wanted = "any"
    if not isinstance(wanted, str) or (wanted not in names and wanted not in _MODES):
        raise GenerationOptionError(
            f"tool_choice={choice!r}: expected None, 'auto', 'none', 'any', 'required', True or a bound tool's name "
            f"({', '.join(names) or 'none is bound'})"
        )
    wanted = wanted if wanted in names else _MODES[wanted]
    if wanted == "required" and not names:
        raise GenerationOptionError(f"tool_choice={choice!r}: no tool is bound that could be called")
    return wanted

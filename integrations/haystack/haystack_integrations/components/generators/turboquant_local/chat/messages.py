"""Haystack's messages and tools as the engine's, and the engine's reply as a Haystack message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from haystack.dataclasses import (
    ChatMessage,
    ChatRole,
    FileContent,
    ImageContent,
    ReasoningContent,
    TextContent,
    ToolCall,
    ToolCallResult,
)
from haystack.tools import ToolsType, flatten_tools_or_toolsets, warm_up_tools, warm_up_tools_async
from haystack.tools.tool import Tool

from turboquant_local.engine import types as engine
from turboquant_local.errors import PromptError

ToolParser = Callable[[str], list[ToolCall] | None]
"""What `tool_parsing_function` may be: the reply's text in, its calls or None out."""


def to_engine_messages(messages: Sequence[ChatMessage]) -> list[engine.Message]:
    """Convert a conversation.

    A message with several tool results becomes one engine message per result.

    Args:
        messages: The conversation, oldest first.

    Raises:
        PromptError: An image or a file, which a text model cannot read, a message without content, or tool results
            mixed with other content.
    """
    converted: list[engine.Message] = []
    for position, message in enumerate(messages):
        where = f"messages[{position}] ({message.role.value})"
        for part in message._content:
            _refuse_media(part, where)
        if message.tool_call_results:
            converted += _tool_results(message, where)
        elif message.is_from(ChatRole.TOOL):
            raise PromptError(f"{where}: expected a ToolCallResult; use ChatMessage.from_tool(result, origin=call)")
        elif not message.texts and not message.is_from(ChatRole.ASSISTANT):
            raise PromptError(f"{where}: expected some text, but the message is empty")
        else:
            converted.append(
                engine.Message(
                    role=message.role.value,
                    content=_joined(message.texts),
                    tool_calls=tuple(_engine_call(call) for call in message.tool_calls),
                    name=message.name,
                    reasoning=_joined([part.reasoning_text for part in message.reasonings]) or None,
                )
            )
    return converted


def ready_tools(own: ToolsType | None, given: ToolsType | None) -> ToolsType | None:
    """The tools of one run: those given, else the component's own; warmed up, since a toolset may have none before.

    Raises:
        TypeError: Something that is no tool.
    """
    tools = _chosen_tools(own, given)
    warm_up_tools(tools)
    return tools


async def ready_tools_async(own: ToolsType | None, given: ToolsType | None) -> ToolsType | None:
    """As `ready_tools`, on the event loop that serves the run."""
    tools = _chosen_tools(own, given)
    await warm_up_tools_async(tools)
    return tools


def to_engine_tools(tools: Sequence[Tool]) -> tuple[engine.Tool, ...]:
    """Convert tools; their schemas are checked by the engine, which knows what a template can print."""
    return tuple(engine.Tool(tool.name, tool.description, tool.parameters) for tool in tools)


def to_engine_parser(parser: ToolParser) -> Callable[[str], Sequence[engine.ToolCall]]:
    """Let the engine call a `tool_parsing_function` that speaks Haystack's ToolCall.

    Raises:
        TypeError: From the function made: it returned something else.
    """

    def parse(text: str) -> Sequence[engine.ToolCall]:
        calls = list(parser(text) or ())
        if not all(isinstance(call, ToolCall) for call in calls):
            raise TypeError(f"tool_parsing_function returned {calls!r}: expected a list of ToolCall, or None")
        return [_engine_call(call) for call in calls]

    return parse


def to_chat_message(reply: engine.ChatReply, meta: dict[str, Any]) -> ChatMessage:
    """Build the assistant's message of a finished reply.

    Args:
        reply: What the engine generated.
        meta: The message's meta, see `reply_meta`.

    Returns:
        A message whose text is None where the reply has none, as Haystack's own joining of chunks gives it.
    """
    return ChatMessage.from_assistant(
        text=reply.text or None,
        reasoning=reply.reasoning or None,
        tool_calls=[
            ToolCall(id=call.id, tool_name=call.name, arguments=dict(call.arguments)) for call in reply.tool_calls
        ],
        meta=meta,
    )


def _chosen_tools(own: ToolsType | None, given: ToolsType | None) -> ToolsType | None:
    tools = own if given is None else given
    flatten_tools_or_toolsets(tools)  # says what is wrong with anything else
    return tools


def _engine_call(call: ToolCall) -> engine.ToolCall:
    return engine.ToolCall(name=call.tool_name, arguments=call.arguments, id=call.id or "")


def _tool_results(message: ChatMessage, where: str) -> list[engine.Message]:
    if len(message.tool_call_results) != len(message):
        raise PromptError(f"{where}: tool results stand with other content; put the other content in its own message")
    return [
        engine.Message(
            role="tool",
            content=_result_text(result, where),
            tool_call_id=result.origin.id,
            name=result.origin.tool_name,
        )
        for result in message.tool_call_results
    ]


def _result_text(result: ToolCallResult, where: str) -> str:
    if isinstance(result.result, str):
        text = result.result
    else:
        for part in result.result:
            _refuse_media(part, f"{where}, result of tool {result.origin.tool_name!r}")
        text = _joined([part.text for part in result.result if isinstance(part, TextContent)])
    return engine.failed_result(text) if result.error else text


def _refuse_media(part: object, where: str) -> None:
    if isinstance(part, (ImageContent, FileContent)):
        kind = part.mime_type or "unknown type"
        raise PromptError(
            f"{where}: holds {type(part).__name__} ({kind}), but the model reads text only; "
            "remove this part or put its text into the message"
        )
    if not isinstance(part, (TextContent, ToolCall, ToolCallResult, ReasoningContent)):
        raise PromptError(
            f"{where}: holds {type(part).__name__}; expected text, a tool call, a tool result or reasoning"
        )


def _joined(texts: Sequence[str]) -> str:
    """Parts of a message on lines of their own, so that the last word of one does not grow into the next."""
    return "\n".join(texts)

"""LangChain's messages as the engine's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from turboquant_local.engine import types as engine
from turboquant_local.errors import PromptError

_MEDIA: Final = frozenset(
    {"image", "image_url", "input_image", "audio", "input_audio", "video", "file", "input_file", "document", "media"}
)
"""Types of blocks that hold what a text model cannot read, in the words of LangChain, OpenAI, Anthropic and Google."""

_REASONING: Final[Mapping[str, str]] = {"reasoning": "reasoning", "thinking": "thinking"}
"""Types of blocks that hold an assistant's thinking, with the key of its text."""

_CALLS: Final[Mapping[str, str]] = {"tool_call": "args", "tool_use": "input"}
"""Types of blocks that hold a tool call, with the key of its arguments."""

# Half a call is found whole in the message's tool_calls; encrypted thinking has nothing to read.
_SKIPPED: Final = frozenset({"tool_call_chunk", "input_json_delta", "redacted_thinking"})

_ROLES: Final[Mapping[str, engine.Role]] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "system",
}


def to_engine_messages(messages: Sequence[BaseMessage]) -> list[engine.Message]:
    """Convert a conversation.

    Args:
        messages: The conversation, oldest first.

    Raises:
        PromptError: A message or content block that a text model's chat template cannot express; the error names it.
    """
    return [_converted(message, f"messages[{position}]") for position, message in enumerate(messages)]


def with_calls_of_lone_results(messages: Sequence[engine.Message]) -> list[engine.Message]:
    """Put a call before each tool result that has none, so that a part of a conversation can be counted.

    `trim_messages` counts slices that begin anywhere; the engine refuses to answer those, and rightly so.
    """
    made: set[str] = set()
    complete: list[engine.Message] = []
    for message in messages:
        made.update(call.id for call in message.tool_calls)
        if message.role == "tool" and (message.tool_call_id or "") not in made:
            call = engine.ToolCall(message.name or "tool", {}, message.tool_call_id or "")
            made.add(call.id)
            complete.append(engine.Message("assistant", tool_calls=(call,)))
        complete.append(message)
    return complete


def _converted(message: BaseMessage, where: str) -> engine.Message:
    where = f"{where} ({message.type})"
    if isinstance(message, ToolMessage):
        return engine.Message("tool", _result(message, where), tool_call_id=message.tool_call_id, name=message.name)
    if isinstance(message, AIMessage):
        return _assistant(message, where)
    return engine.Message(_role(message, where), "\n".join(_texts(message, where)), name=message.name)


def _role(message: BaseMessage, where: str) -> engine.Role:
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, ChatMessage) and message.role in _ROLES:
        return _ROLES[message.role]
    what = f"role={message.role!r}" if isinstance(message, ChatMessage) else type(message).__name__
    raise PromptError(
        f"{where}: {what} has no place in a chat template; expected a SystemMessage, HumanMessage, AIMessage or "
        f"ToolMessage, or a ChatMessage with a role among {', '.join(_ROLES)}"
    )


def _assistant(message: AIMessage, where: str) -> engine.Message:
    calls = [engine.ToolCall(call["name"], call["args"], call["id"] or "") for call in message.tool_calls]
    texts, thoughts = [], []
    for block, at in _blocks(message, where):
        kind = str(block.get("type"))
        if kind in _REASONING:
            thoughts.append(str(block.get(_REASONING[kind]) or ""))
        elif kind in _CALLS:
            # LangChain's own messages list their calls twice: as blocks and as tool_calls.
            if not any(call.id == block.get("id") for call in calls):
                calls.append(engine.ToolCall(block["name"], block.get(_CALLS[kind]) or {}, block.get("id") or ""))
        elif kind not in _SKIPPED:
            texts.append(_text(block, at))
    if not thoughts:
        thoughts = [str(message.additional_kwargs.get("reasoning_content") or "")]
    return engine.Message(
        "assistant",
        "".join(texts),
        tool_calls=tuple(calls),
        name=message.name,
        reasoning="".join(thoughts) or None,
    )


def _result(message: ToolMessage, where: str) -> str:
    text = "\n".join(_texts(message, where))
    return engine.failed_result(text) if message.status == "error" else text


def _texts(message: BaseMessage, where: str) -> list[str]:
    return [_text(block, at) for block, at in _blocks(message, where)]


def _blocks(message: BaseMessage, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields (block, where it stands)."""
    content = [message.content] if isinstance(message.content, str) else message.content
    for position, item in enumerate(content):
        yield {"type": "text", "text": item} if isinstance(item, str) else item, f"{where}, block {position}"


def _text(block: Mapping[str, Any], where: str) -> str:
    kind = block.get("type")
    if kind in ("text", "text-plain") and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind in _MEDIA:
        raise PromptError(
            f"{where}: a block of type {kind!r}, but the model reads text only; remove it or put its text into the "
            "message"
        )
    raise PromptError(
        f"{where}: a block of type {kind!r}; expected text, or in an AIMessage reasoning and tool calls; tool results "
        "go into a ToolMessage"
    )

"""Splits a streamed reply into reasoning, text and tool calls."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from turboquant_local.engine.prompt import THINK, THINK_END
from turboquant_local.engine.text import partial_suffix
from turboquant_local.engine.tool_formats import (
    HERMES_MARK,
    MARKS,
    MISTRAL_MARK,
    NO_CALL,
    PENDING,
    SPACE,
    Calls,
    read_calls,
)
from turboquant_local.engine.types import Delta, ReasoningDelta, TextDelta, Tool, ToolCall, ToolCallDelta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ToolParser: TypeAlias = Callable[[str], Sequence[ToolCall] | None]
"""Reads the tool calls of a whole reply; None or nothing if it has none."""

_LINE_ENDS: Final = "\r\n"


class ReplyParser:
    """Reads a reply piece by piece and gives every part as soon as it is certain.

    How the reply is cut into pieces changes nothing in what comes out, joined. Rules:

    - Reasoning is what stands between `<think>` and `</think>` at the start of the reply, or before `</think>`
      when the prompt opened the block. Line breaks at its edges and after it are dropped.
    - Tool calls are read only when tools were offered, in the formats of `tool_formats`. Whitespace around a
      call is dropped. A call that is broken or not finished is text, just as the model wrote it.
    - All other text is untouched.

    Args:
        tools: The tools offered to the model.
        starts_in_reasoning: The prompt ends inside an opened thinking block (`prompt.opens_reasoning`).
        tokenizer: When its chat template writes calls with a mark, an unmarked JSON reply is never one.
        tool_parser: Reads calls from a whole reply (without reasoning) in place of the formats known here. Text
            streams up to the first mark that could start a call and is held from there on; at the end
            it is dropped if the function found calls, and is text if it found none. Where a reply has no such
            mark all of it has streamed as text, and the calls come after it.
        is_constrained: The reply is either calls of these tools alone or a text alone: marks inside a text mean
            nothing.
    """

    def __init__(
        self,
        *,
        tools: Sequence[Tool] = (),
        starts_in_reasoning: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tool_parser: ToolParser | None = None,
        is_constrained: bool = False,
    ) -> None:
        self._tools = tuple(tools)
        self._marks = MARKS if tools else ()
        self._unmarked_calls = bool(tools) and not _writes_marks(tokenizer)
        self._tool_parser = tool_parser if tools else None
        self._is_constrained = is_constrained
        self._buffer = ""
        self._in_reasoning = starts_in_reasoning
        self._may_repeat_think = starts_in_reasoning
        self._at_start = True  # neither text nor a call has come yet
        self._drop = _LINE_ENDS if starts_in_reasoning else ""  # characters left out until another one comes
        self._deltas: list[Delta] = []
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: list[ToolCall] = []

    @property
    def in_reasoning(self) -> bool:
        """Whether the next text belongs to the reasoning."""
        return self._in_reasoning

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """The thinking so far."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far."""
        return tuple(self._tool_calls)

    def push(self, text: str) -> list[Delta]:
        """Takes more of the reply; returns what is certain now."""
        self._buffer += text
        return self._advance(final=False)

    def finish(self) -> list[Delta]:
        """Returns the rest; what was held back as a possible mark or call turns out to be one, or text."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> list[Delta]:
        more = True
        while more:
            if self._drop:
                self._buffer = self._buffer.lstrip(self._drop)
                self._drop = self._drop if not self._buffer else ""
            more = self._step_reasoning(final) if self._in_reasoning else self._step_text(final)
        deltas, self._deltas = self._deltas, []
        return deltas

    def _step_reasoning(self, final: bool) -> bool:
        """Takes reasoning from the buffer; returns whether there is more to do without more text."""
        if self._may_repeat_think:
            # Some models open the block once more although the prompt did.
            if _is_begun(self._buffer, THINK) and not final:
                return False
            self._may_repeat_think = False
            if self._buffer.startswith(THINK):
                self._buffer, self._drop = self._buffer[len(THINK) :], _LINE_ENDS
                return True
        content, mark, rest = self._buffer.partition(THINK_END)
        held = 0 if mark or final else partial_suffix(content, THINK_END)
        sure = content[: len(content) - held].rstrip(_LINE_ENDS)
        if sure:
            self._reasoning.append(sure)
            self._add(ReasoningDelta(sure))
        if mark:
            self._buffer, self._in_reasoning, self._drop = rest, False, _LINE_ENDS
        else:
            self._buffer = "" if final else content[len(sure) :]
        return bool(mark)

    def _step_text(self, final: bool) -> bool:
        """Takes text or a call from the buffer; returns whether there is more to do without more text."""
        if self._at_start:
            lead = self._buffer.lstrip(SPACE)
            if _is_begun(lead, THINK) and not final:
                return False
            if lead.startswith(THINK):
                self._buffer, self._in_reasoning, self._drop = lead[len(THINK) :], True, _LINE_ENDS
                return True
        found = self._next_mark()
        if found is None:
            self._take_text(len(self._buffer) if final else self._sure_length())
            if final and self._tool_parser is not None:
                self._take_parsed_calls(self._tool_parser)
            return False
        at, mark = found
        self._take_text(len(self._buffer[:at].rstrip(SPACE)))
        if self._tool_parser is not None:
            if final:
                self._take_parsed_calls(self._tool_parser)
            return False
        end = self._buffer.index(mark) + len(mark)
        body = self._buffer[end:]
        reading = read_calls(mark, body, self._tools, final=final)
        if self._is_constrained and isinstance(reading, Calls) and not self._are_offered(reading.calls):
            reading = NO_CALL
        if reading is PENDING:
            return False
        if isinstance(reading, Calls):
            self._take_calls(reading.calls)
            self._buffer, self._drop = body[reading.end :], SPACE
        else:
            self._at_start = False
            self._take_text(end)
        return True

    def _next_mark(self) -> tuple[int, str] | None:
        """Where the next possible call is and its mark, "" for a reply that begins with a JSON object."""
        if self._at_start and self._unmarked_calls:
            lead = self._buffer.lstrip(SPACE)
            if lead.startswith("{"):
                return len(self._buffer) - len(lead), ""
        if self._is_constrained:
            lead = self._buffer.lstrip(SPACE)
            return next(((len(self._buffer) - len(lead), mark) for mark in self._marks if lead.startswith(mark)), None)
        return min(((at, mark) for mark in self._marks if (at := self._buffer.find(mark)) >= 0), default=None)

    def _sure_length(self) -> int:
        """Length of the buffer's start that cannot belong to a mark or to the space before one."""
        if not self._marks:
            return len(self._buffer)
        if self._is_constrained:
            lead = self._buffer.lstrip(SPACE)
            return 0 if any(_is_begun(lead, mark) for mark in self._marks) else len(self._buffer)
        held = max(partial_suffix(self._buffer, mark) for mark in self._marks)
        return len(self._buffer[: len(self._buffer) - held].rstrip(SPACE))

    def _take_text(self, length: int) -> None:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        if text:
            self._at_start = False
            if self._is_constrained:
                self._marks = ()
            self._text.append(text)
            self._add(TextDelta(text))

    def _are_offered(self, calls: Sequence[ToolCall]) -> bool:
        return {call.name for call in calls} <= {tool.name for tool in self._tools}

    def _take_calls(self, calls: Sequence[ToolCall]) -> None:
        for call in calls:
            self._at_start = False
            if not call.id or any(call.id == other.id for other in self._tool_calls):
                call = dataclasses.replace(call, id=f"call_{uuid.uuid4().hex[:24]}")
            self._add(ToolCallDelta(len(self._tool_calls), call))
            self._tool_calls.append(call)

    def _take_parsed_calls(self, tool_parser: ToolParser) -> None:
        self._tool_parser = None
        calls = tool_parser(self.text + self._buffer)
        if calls:
            self._buffer = ""
            self._take_calls(calls)
        self._take_text(len(self._buffer))

    def _add(self, delta: Delta) -> None:
        """Adds a delta, joined to the last one where both are of the same kind."""
        last = self._deltas[-1] if self._deltas else None
        if isinstance(delta, TextDelta) and isinstance(last, TextDelta):
            self._deltas[-1] = TextDelta(last.text + delta.text)
        elif isinstance(delta, ReasoningDelta) and isinstance(last, ReasoningDelta):
            self._deltas[-1] = ReasoningDelta(last.text + delta.text)
        else:
            self._deltas.append(delta)


def _is_begun(text: str, mark: str) -> bool:
    """Whether more text could complete the mark."""
    return len(text) < len(mark) and mark.startswith(text)


def _writes_marks(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the model's own chat template writes tool calls with a mark."""
    template = getattr(tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any(mark in text for text in texts for mark in (HERMES_MARK, MISTRAL_MARK))

"""How models write tool calls: one reader for each format.

A reader gets the text after its mark and answers with the calls and how many characters they took, with
`PENDING` while more text can decide, or with `NO_CALL`. What it answers never changes when more text follows.

| mark | then | models |
|---|---|---|
| `<tool_call>` | `{"name": ..., "arguments": {...}}</tool_call>` | Hermes, Qwen2.5, Qwen3 |
| `<tool_call>` | `<function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>` | Qwen3-Coder, Qwen3.5 |
| `[TOOL_CALLS]` | `[{"name": ..., "arguments": {...}}, ...]` | Mistral |
| `[TOOL_CALLS]` | `NAME[ARGS]{...}`, `NAME{...}`, `NAME[CALL_ID]ID[ARGS]{...}` | Mistral, newer |
| `<|python_tag|>`, or none at all | `{"name": ..., "parameters": {...}}; {...}` up to the end | Llama 3 |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NoReturn, TypeAlias, cast

from turboquant_local.engine.types import JSON, Tool, ToolCall

HERMES_MARK: Final = "<tool_call>"
HERMES_END: Final = "</tool_call>"
MISTRAL_MARK: Final = "[TOOL_CALLS]"
LLAMA_MARK: Final = "<|python_tag|>"
MARKS: Final = (HERMES_MARK, MISTRAL_MARK, LLAMA_MARK)
SPACE: Final = " \t\r\n"

# Qwen3-Coder. A value may hold "</parameter>": it ends where another parameter or the end follows.
_FUNCTION: Final = "<function="
_FUNCTION_HEAD: Final = re.compile(r"<function=([^>\s]+)>\s*")
_FUNCTION_END: Final = re.compile(r"</function>\s*</tool_call>")
_PARAMETER: Final = re.compile(r"<parameter=([^>\n]+)>\r?\n?(.*?)\r?\n?</parameter>\s*(?=<parameter=|\Z)", re.DOTALL)

# Mistral. The second matches every beginning of what the first matches.
_MISTRAL_HEAD: Final = re.compile(r"([^\s\[\]{}]+)\s*(?:\[CALL_ID\]\s*([^\s\[\]{}]+)\s*)?(?:\[ARGS\]\s*)?")
_MISTRAL_HEAD_BEGUN: Final = re.compile(r"[^\s\[\]{}]+\s*(?:\[(?:[CA][^{}]*)?)?")

# Llama 3, whose calls may come without a mark: only an object with these keys can be one.
_KEYS: Final = frozenset({"name", "arguments", "parameters", "id", "type", "function"})
_ARGUMENT_KEYS: Final = frozenset({"arguments", "parameters", "function"})
# The first key of an object tells already that it is no call, so that a reply in JSON need not wait for its end.
_OTHER_OBJECT: Final = re.compile(rf'\{{\s*(?:[^\s"]|"(?!(?:{"|".join(sorted(_KEYS))})")[^"]*")')


class Undecided(Enum):
    """Why a reader has no calls."""

    PENDING = "more text can decide"
    NO_CALL = "this is no tool call"


PENDING: Final = Undecided.PENDING
NO_CALL: Final = Undecided.NO_CALL


@dataclass(frozen=True)
class Calls:
    """What a reader found.

    Attributes:
        calls: The calls; their id is "" where the model gave none.
        end: Characters they took, the closing mark included.
    """

    calls: tuple[ToolCall, ...]
    end: int


Reading: TypeAlias = Calls | Undecided


def read_calls(mark: str, body: str, tools: Sequence[Tool], *, final: bool) -> Reading:
    """Reads what follows a mark.

    Args:
        mark: One of `MARKS`, or "" for the start of a reply, where Llama 3 needs no mark.
        body: The text after it, as far as it has come.
        tools: The tools that were offered.
        final: No more text will come.
    """
    if mark == MISTRAL_MARK:
        reading = _read_mistral(body)
    elif mark == HERMES_MARK:
        reading = _read_hermes(body, tools, final=final)
    else:
        reading = _read_llama(body, tools, final=final)
    return NO_CALL if final and reading is PENDING else reading


def _read_llama(body: str, tools: Sequence[Tool], *, final: bool) -> Reading:
    """Objects separated by ';' up to the end of the reply: all of them are calls, or none is."""
    calls: list[ToolCall] = []
    at = _skip_space(body, 0)
    while at < len(body):
        if body[at] != "{" or _OTHER_OBJECT.match(body, at):
            return NO_CALL
        decoded = _decode(body, at)
        if decoded is None:
            return PENDING
        value, at = decoded
        call = _call(value)
        known = call is not None and any(tool.name == call.name for tool in tools)
        if call is None or value.keys() - _KEYS or not (known or value.keys() & _ARGUMENT_KEYS):
            return NO_CALL
        calls.append(call)
        at = _skip_space(body, at)
        if at < len(body) and body[at] != ";":
            return NO_CALL
        at = _skip_space(body, at + 1)
    return Calls(tuple(calls), len(body)) if final and calls else PENDING


def _read_hermes(body: str, tools: Sequence[Tool], *, final: bool) -> Reading:
    at = _skip_space(body, 0)
    if body.startswith("{", at):
        decoded = _decode(body, at)
        if decoded is None:
            return PENDING
        value, at = decoded
        call = _call(value)
        if call is None:
            return NO_CALL
        at = _skip_space(body, at)
        if body.startswith(HERMES_END, at):
            return Calls((call,), at + len(HERMES_END))
        rest = body[at:]
        # The object is whole: at the end, or before another call, a model may leave the closing mark out.
        if rest.startswith(HERMES_MARK) or (final and HERMES_END.startswith(rest)):
            return Calls((call,), at if rest.startswith(HERMES_MARK) else len(body))
        return PENDING if HERMES_END.startswith(rest) or HERMES_MARK.startswith(rest) else NO_CALL
    if _FUNCTION.startswith(body[at : at + len(_FUNCTION)]):
        return _read_function(body, at, tools)
    return NO_CALL


def _read_function(body: str, at: int, tools: Sequence[Tool]) -> Reading:
    end = _FUNCTION_END.search(body, at)
    if end is None:
        return PENDING
    head = _FUNCTION_HEAD.match(body, at)
    if head is None:
        return NO_CALL
    name, inner = head[1], body[head.end() : end.start()]
    schema = next((tool.parameters for tool in tools if tool.name == name), {})
    arguments: dict[str, JSON] = {}
    at = 0
    while at < len(inner):
        parameter = _PARAMETER.match(inner, at)
        if parameter is None:
            return NO_CALL
        key, text = parameter[1].strip(), parameter[2]
        arguments[key] = _typed(text, schema.get("properties", {}).get(key, {}))
        at = parameter.end()
    call = _call({"name": name, "arguments": arguments})
    return NO_CALL if call is None else Calls((call,), end.end())


def _typed(text: str, schema: object) -> JSON:
    """A value written without quotes: JSON where the tool's schema rules a string out, else the text itself."""
    kinds = _kinds(schema)
    plain = text.strip()
    if "null" in kinds and plain == "null":
        return None
    if not kinds or "string" in kinds:
        return text
    return cast(JSON, _whole(plain.lower() if kinds <= {"boolean", "null"} else plain, default=text))


def _kinds(schema: object) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    own = schema.get("type", [])
    kinds = {own} if isinstance(own, str) else set(own)
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        kinds |= _kinds(choice)
    return kinds


def _read_mistral(body: str) -> Reading:
    at = _skip_space(body, 0)
    if at == len(body):
        return PENDING
    if body[at] in "[{":
        decoded = _decode(body, at)
        if decoded is None:
            return PENDING
        value, at = decoded
        calls = [_call(item) for item in (value if isinstance(value, list) else [value])]
        found = tuple(call for call in calls if call is not None)
        return Calls(found, at) if found and len(found) == len(calls) else NO_CALL
    brace = body.find("{", at)
    if brace < 0:
        return PENDING if _MISTRAL_HEAD_BEGUN.fullmatch(body, at) else NO_CALL
    head = _MISTRAL_HEAD.fullmatch(body, at, brace)
    if head is None:
        return NO_CALL
    decoded = _decode(body, brace)
    if decoded is None:
        return PENDING
    call = _call({"name": head[1], "id": head[2], "arguments": decoded[0]})
    return NO_CALL if call is None else Calls((call,), decoded[1])


def _call(value: Any) -> ToolCall | None:
    """A call from its JSON object; None when it is none."""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):  # the way tools and calls are written in OpenAI's API
        value = {"id": value.get("id")} | value["function"]
    name, call_id = value.get("name"), value.get("id")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _whole(arguments.strip() or "{}", default=arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        return None
    try:
        # Half of a surrogate pair is valid JSON, but no text: the next prompt could not be encoded.
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return None
    return ToolCall(name.strip(), arguments, call_id if isinstance(call_id, str) else "")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


# Not strict: models write line breaks inside strings as they are.
_DECODER: Final = json.JSONDecoder(strict=False, parse_constant=_refuse)


def _decode(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value at `at` and where it ends; None when it is broken or not complete."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None


def _whole(text: str, *, default: object) -> Any:
    """The value that all of `text` is in JSON, or the default."""
    decoded = _decode(text, 0)
    return decoded[0] if decoded and decoded[1] == len(text) else default


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at

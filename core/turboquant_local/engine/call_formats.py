"""How a grammar writes tool calls: in the format of the model's chat template, which `tool_formats` reads back.

| the template has | a call is written as |
|---|---|
| `[TOOL_CALLS]` and `[ARGS]` | `[TOOL_CALLS]NAME[ARGS]{...}` |
| `[TOOL_CALLS]` | `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]` |
| `<tool_call>` | `<tool_call>`, line break, `{"name": ..., "arguments": {...}}`, line break, `</tool_call>` |
| `<|python_tag|>` or "parameters" beside a `{"name":` | `{"name": ..., "parameters": {...}}`, one call a reply |
| none of them | as for `<tool_call>` |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

from turboquant_local.engine.json_schema import prepared
from turboquant_local.engine.prompt import THINK, THINK_END
from turboquant_local.engine.reply_form import ReplyForm
from turboquant_local.engine.tool_formats import HERMES_END, HERMES_MARK, LLAMA_MARK, MISTRAL_MARK
from turboquant_local.engine.types import Tool

CallFormat: TypeAlias = Literal["hermes", "mistral", "mistral_args", "llama"]
Thought: TypeAlias = Literal["none", "possible", "open"]

_ARGS: Final = "[ARGS]"
_LLAMA_SHAPE: Final = re.compile(r'\{\s*\\?"name\\?":[^}]*\\?"parameters\\?":')

# One way to write JSON, that of json.dumps: models know it well, and white space can go on for ever.
_STYLE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_format(templates: str) -> CallFormat:
    """The format that a chat template (or several, joined) writes calls in."""
    if MISTRAL_MARK in templates:
        return "mistral_args" if _ARGS in templates else "mistral"
    if HERMES_MARK not in templates and (LLAMA_MARK in templates or _LLAMA_SHAPE.search(templates)):
        return "llama"
    return "hermes"


def write_grammar(form: ReplyForm, style: CallFormat, thought: Thought, mark: Callable[[str], str]) -> str:
    """The grammar of a whole reply, in llguidance's dialect of Lark.

    Args:
        form: What the reply must be.
        style: How calls are written.
        thought: Whether the reply begins inside a thinking block, may begin with one, or has none.
        mark: Writes a mark of the model's: as its token where it has one, else as text.
    """
    rules: dict[str, str] = {}
    if style == "llama" and form.tools:
        # Calls without a mark begin as a JSON text does: in one schema, either can still come after the same start.
        rules["reply"] = json_rule(_calls_schema(form.tools, "parameters", form.schema))
    else:
        if form.tools:
            rules |= _marked_calls(form, style, mark)
        if form.schema is not None:
            rules["text"] = json_rule(prepared(form.schema))
        rules["reply"] = " | ".join(name for name in ("calls", "text") if name in rules)
    thought_rules = _thought_rules(thought, mark)
    begin = {"none": "", "possible": "thought?", "open": "thought"}[thought]
    rules |= thought_rules | {"start": f"{begin} reply"}
    return "\n".join(f"{name}: {rule}" for name, rule in rules.items())


def _thought_rules(thought: Thought, mark: Callable[[str], str]) -> dict[str, str]:
    if thought == "none":
        return {}
    begin, end = mark(THINK), mark(THINK_END)
    # Some models open the block once more although the prompt did.
    rules = {"thought": rf"{f'({begin})?' if thought == 'open' else begin} thinking /\n{{0,2}}/"}
    if end.startswith("<["):
        return rules | {"thinking": f"/(?s:.*)/ {end}"}
    return rules | {f"thinking[suffix={end}]": "/(?s:.*)/"}


def _marked_calls(form: ReplyForm, style: CallFormat, mark: Callable[[str], str]) -> dict[str, str]:
    if style == "mistral_args":
        rules = {}
        for index, tool in enumerate(form.tools):
            name = json.dumps(tool.name, ensure_ascii=False)
            rules[f"call_{index}"] = f"{name} {mark(_ARGS)} arguments_{index}"
            rules[f"arguments_{index}"] = json_rule(prepared(tool.parameters))
        names = " | ".join(name for name in rules if name.startswith("call_"))
        return rules | {"one": f"{mark(MISTRAL_MARK)} ({names})", "calls": "one+" if form.several_calls else "one"}
    call = _calls_schema(form.tools, "arguments")
    if style == "mistral":
        several = {} if form.several_calls else {"maxItems": 1}
        listed = {"type": "array", "items": {"anyOf": call["anyOf"]}, "minItems": 1, **several, "$defs": call["$defs"]}
        return {"call": json_rule(listed), "calls": f'{mark(MISTRAL_MARK)} (" ")? call'}
    return {
        "call": json_rule(call),
        "one": rf'{mark(HERMES_MARK)} "\n" call "\n" {mark(HERMES_END)}',
        "calls": r'one ("\n" one)*' if form.several_calls else "one",
    }


def _calls_schema(tools: Sequence[Tool], key: str, text: Any = None) -> dict[str, Any]:
    """The schema of one call's object, with the arguments under `key`; or of a text, if its schema is given."""
    choices: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for index, tool in enumerate(tools):
        ref = f"#/$defs/arguments_{index}"
        definitions[f"arguments_{index}"] = prepared(tool.parameters, ref)
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, key: {"$ref": ref}},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    if text is not None:
        definitions["text"] = prepared(text, "#/$defs/text")
        choices.append({"$ref": "#/$defs/text"})
    return {"anyOf": choices, "$defs": definitions}


def json_rule(schema: Any) -> str:
    """A schema as the body of a grammar rule."""
    # True and False are schemas too, with no place for the style.
    styled = {**(schema if isinstance(schema, Mapping) else {"allOf": [schema]}), "x-guidance": _STYLE}
    return f"%json {json.dumps(styled)}"

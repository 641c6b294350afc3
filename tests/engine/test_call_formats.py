"""Grammars of tool calls in each format, and that the parser reads back what they let through."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from turboquant_local.engine import Tool
from turboquant_local.engine.call_formats import call_format
from turboquant_local.engine.grammar import Constraint, make_constraint
from turboquant_local.engine.parsing import ReplyParser
from turboquant_local.engine.reply_form import ReplyForm

TINY = str(Path(__file__).parents[2] / "examples" / "tiny-model")
ADD = Tool(
    "add",
    "",
    {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/n"}},
        "required": ["a"],
        "$defs": {"n": {"type": "integer"}},
    },
)
ADD_ALL = Tool(
    "add_all", "", {"type": "object", "properties": {"all": {"type": "array", "items": {"type": "integer"}}}}
)
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "k": {"type": "integer"}}, "required": ["name"]}

TEMPLATES = {
    "hermes": "{{ tools }}<tool_call>\n{{ call }}\n</tool_call>",
    "mistral": "[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS] [{{ call }}]",
    "mistral_args": "[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}",
    "llama": 'Respond in the format {"name": function name, "parameters": dictionary}. {{ "<|python_tag|>" }}',
}
CALLS = {
    "hermes": [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
        '<tool_call>\n{"name": "add_all", "arguments": {"all": [1, 2]}}\n</tool_call>',
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}',
        '{"name": "add_all", "arguments": {"all": [1, 2]}}]',
    ],
    "mistral_args": ['[TOOL_CALLS]add[ARGS]{"a": 1}', '[TOOL_CALLS]add_all[ARGS]{"all": [1, 2]}'],
    "llama": ['{"name": "add", "parameters": {"a": 1}}'],
}
BETWEEN = {"hermes": "\n", "mistral": ", ", "mistral_args": "", "llama": "; "}
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]"]


@pytest.fixture(scope="module", params=["marks are tokens", "marks are text"])
def marks_are_tokens(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "marks are tokens")


def tokenizer(style: str, marks_are_tokens: bool) -> PreTrainedTokenizerFast:
    made = AutoTokenizer.from_pretrained(TINY)
    description = json.loads(made.backend_tokenizer.to_str())
    if not marks_are_tokens:
        description["added_tokens"] = [token for token in description["added_tokens"] if token["special"]]
        description["model"]["vocab"] = {
            token.replace("<tool_call>", "<unused_1>").replace("</tool_call>", "<unused_2>"): number
            for token, number in description["model"]["vocab"].items()
        }
    changed = made.backend_tokenizer.from_str(json.dumps(description))
    made = PreTrainedTokenizerFast(tokenizer_object=changed, eos_token="<|im_end|>", chat_template=TEMPLATES[style])
    if marks_are_tokens:
        made.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    assert (len(made(MARKS[0], add_special_tokens=False)["input_ids"]) == 1) == marks_are_tokens
    return made


def held(form: ReplyForm, tokenizer: Any) -> Constraint:
    return make_constraint(form, tokenizer, prompt_end="", may_think=False, end_ids=[2])


def fits(constraint: Constraint, tokenizer: Any, text: str) -> bool:
    """Whether a whole reply gets through; uses the constraint up."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    matcher = constraint._matcher
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("style", TEMPLATES)
def test_the_template_tells_the_format(style: str) -> None:
    assert call_format(TEMPLATES[style]) == style


def test_a_template_that_tells_nothing() -> None:
    assert call_format("{{ tools | tojson }}") == "hermes"
    assert call_format("") == "hermes"


@pytest.mark.parametrize("style", TEMPLATES)
def test_calls_that_fit_are_read_back(style: str, marks_are_tokens: bool) -> None:
    words = tokenizer(style, marks_are_tokens)
    form = ReplyForm((ADD, ADD_ALL), None, several_calls=True)
    closed = "]" if style == "mistral" else ""
    both = BETWEEN[style].join(CALLS[style])
    for text, calls in (
        (CALLS[style][0] + closed, [("add", {"a": 1})]),
        (both, [("add", {"a": 1}), ("add_all", {"all": [1, 2]})]),
    ):
        if style == "llama":  # one call a reply: its templates refuse a turn with several
            calls = calls[:1]
        assert fits(held(form, words), words, text)
        parser = ReplyParser(tools=form.tools, tokenizer=words, is_constrained=True)
        parser.push(text)
        parser.finish()
        assert [(call.name, call.arguments) for call in parser.tool_calls] == calls
        assert parser.text == ""
    one = ReplyForm((ADD, ADD_ALL), None, several_calls=False)
    assert fits(held(one, words), words, CALLS[style][0] + closed)
    if style != "llama":
        assert not fits(held(one, words), words, both)


@pytest.mark.parametrize("style", TEMPLATES)
def test_what_is_no_call_does_not_fit(style: str, marks_are_tokens: bool) -> None:
    words = tokenizer(style, marks_are_tokens)
    form = ReplyForm((ADD,), None, several_calls=True)
    good = CALLS[style][0] + ("]" if style == "mistral" else "")
    assert fits(held(form, words), words, good)
    wrong = [
        "",
        "Hello",
        '{"name": "x"}',
        " " + good,
        good.replace('"a": 1', '"a": "1"'),
        good.replace('"a": 1', '"b": 1'),
    ]
    wrong += [
        good.replace('"a": 1', ""),
        good.replace("add", "sub"),
        good + "!",
        good[:-1],
        good.replace('"a": 1', '"a":  1'),
    ]
    for text in wrong:
        assert not fits(held(form, words), words, text), text


@pytest.mark.parametrize("style", TEMPLATES)
def test_a_call_or_a_text(style: str, marks_are_tokens: bool) -> None:
    words = tokenizer(style, marks_are_tokens)
    form = ReplyForm((ADD,), SCHEMA, several_calls=True)
    call = CALLS[style][0] + ("]" if style == "mistral" else "")
    # A text may look like a call, and hold one inside.
    inside = json.dumps({"name": call, "k": 1})
    for text, calls in ((call, 1), ('{"name": "add", "k": 2}', 0), ('{"name": "Ada"}', 0), (inside, 0)):
        if not (text is inside and marks_are_tokens):  # marks that are tokens never stand in a string
            assert fits(held(form, words), words, text), text
        for size in (1, 3, 1000):
            parser = ReplyParser(tools=form.tools, tokenizer=words, is_constrained=True)
            for start in range(0, len(text), size):
                parser.push(text[start : start + size])
            parser.finish()
            assert len(parser.tool_calls) == calls
            assert parser.text == ("" if calls else text)
    assert not fits(held(form, words), words, '{"k": 2}')
    assert not fits(held(form, words), words, call + '{"name": "Ada"}')


def test_text_streams_although_tools_are_offered() -> None:
    parser = ReplyParser(tools=[ADD], tokenizer=tokenizer("hermes", True), is_constrained=True)
    assert [[delta.text for delta in parser.push(piece)] for piece in ('{"', 'a": "<tool', '_call>"', "}")] == [
        ['{"'],
        ['a": "<tool'],
        ['_call>"'],
        ["}"],
    ]

"""Replies are split into reasoning, text and calls, however they are cut into pieces."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from turboquant_local.engine.parsing import ReplyParser
from turboquant_local.engine.text import TokenDecoder
from turboquant_local.engine.types import Delta, ReasoningDelta, TextDelta, Tool, ToolCall, ToolCallDelta

TINY_MODEL = Path(__file__).parents[2] / "examples" / "tiny-model"
WEATHER = Tool("get_weather", "", {"type": "object", "properties": {"city": {"type": "string"}}})
CLOCK = Tool("get_time", "", {"type": "object", "properties": {}})
TOOLS = (WEATHER, CLOCK)

PARIS = ("get_weather", {"city": "Paris"})
TIME: tuple[str, Any] = ("get_time", {})

Summary = tuple[str, str, list[tuple[str, Any]]]


def parse(reply: str | Sequence[str], **settings: Any) -> tuple[ReplyParser, list[Delta]]:
    """Feeds the pieces, checks that the properties are what was emitted, and returns both."""
    parser = ReplyParser(**({"tools": TOOLS} | settings))
    deltas: list[Delta] = []
    for piece in [reply] if isinstance(reply, str) else reply:
        deltas += parser.push(piece)
    deltas += parser.finish()
    assert "".join(d.text for d in deltas if isinstance(d, TextDelta)) == parser.text
    assert "".join(d.text for d in deltas if isinstance(d, ReasoningDelta)) == parser.reasoning
    calls = [d for d in deltas if isinstance(d, ToolCallDelta)]
    assert tuple(d.call for d in calls) == parser.tool_calls
    assert [d.index for d in calls] == list(range(len(calls)))
    assert not any(d.text == "" for d in deltas if not isinstance(d, ToolCallDelta))
    return parser, deltas


def summary(reply: str | Sequence[str], **settings: Any) -> Summary:
    parser, _ = parse(reply, **settings)
    return parser.reasoning, parser.text, [(call.name, call.arguments) for call in parser.tool_calls]


def joined(deltas: Sequence[Delta]) -> list[tuple[str, Any]]:
    """The deltas in order, neighbours of one kind joined and random ids left out."""
    out: list[tuple[str, Any]] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            out.append(("call", (delta.index, delta.call.name, delta.call.arguments)))
        elif out and out[-1][0] == type(delta).__name__:
            out[-1] = (out[-1][0], out[-1][1] + delta.text)
        else:
            out.append((type(delta).__name__, delta.text))
    return out


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
BARE = '{"name": "get_weather", "parameters": {"city": "Paris"}}'


@pytest.mark.parametrize(
    ("reply", "text", "calls"),
    [
        (CALL, "", [PARIS]),
        (f"I look.\n\n{CALL}\n{CALL}\n", "I look.", [PARIS, PARIS]),
        (f"A {CALL} B {CALL} C", "ABC", [PARIS, PARIS]),
        ('<tool_call>{"name": "get_time"}', "", [TIME]),
        ('<tool_call>{"name": "get_time"}\n</tool_', "", [TIME]),
        ('<tool_call>{"name": "get_time"}\n' + CALL, "", [TIME, PARIS]),
        ("<tool_call>\n<function=get_time>\n</function>\n</tool_call>\n" + CALL, "", [TIME, PARIS]),
        (BARE, "", [PARIS]),
        (f"\n {BARE} \n", "", [PARIS]),
        (f"{BARE};\n{BARE}", "", [PARIS, PARIS]),
        (f"<|python_tag|>{BARE}", "", [PARIS]),
        (f"I look. <|python_tag|>{BARE}; {BARE};", "I look.", [PARIS, PARIS]),
        ('Ok.\n[TOOL_CALLS] [{"name": "get_time", "arguments": {}}, {"name": "get_time"}] ', "Ok.", [TIME, TIME]),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time{}', "", [PARIS, TIME]),
        ('<tool_call>{"name": "unknown_tool", "arguments": {}}</tool_call>', "", [("unknown_tool", {})]),
    ],
)
def test_calls_and_the_text_around_them(reply: str, text: str, calls: list[tuple[str, Any]]) -> None:
    assert summary(reply) == ("", text, calls)
    assert summary(list(reply)) == ("", text, calls)


@pytest.mark.parametrize(
    "reply",
    [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par',
        '<tool_call>\n{"name": "a, "arguments": {}}\n</tool_call> and more',
        '<tool_call>{"name": "a"}}</tool_call>',
        "Write  <tool_call> before the call.",
        "<tool_call>",
        "<tool_c",
        "<tool_call><function=a>text</function></tool_call>",
        "<tool_call><function=a><parameter=x>1</parameter>",
        '{"name": "get_weather", "parameters": {"city": "Par',
        '{"name": "get_weather", "parameters": {}} is how it is called.',
        '{"name": "get_weather", "parameters": {}}; no',
        '{"name": "Bob"}',
        '{"answer": [1, {"name": "get_time"}]} \n',
        '<|python_tag|>print("hi")',
        "[TOOL_CALLS] is a mark {",
        '[TOOL_CALLS][{"name": "a"}, {"name": 3}]',
        "[TOOL_CALLS]name[ARGS]{",
        "[TOOL",
    ],
)
def test_what_is_no_call_comes_out_as_it_was_written(reply: str) -> None:
    for before, after in (("", ""), ("Well, \n ", " \n")):
        whole = before + reply + after
        assert summary(whole) == ("", whole, [])
    assert summary(re.findall(r"(?s).{1,3}", reply)) == ("", reply, [])


def test_a_broken_call_does_not_take_the_next_one_with_it() -> None:
    reply = 'A\n<tool_call>\n{broken}\n</tool_call>\n<tool_call>\n{"name": "get_time"}\n</tool_call>'
    assert summary(reply) == ("", "A\n<tool_call>\n{broken}\n</tool_call>", [("get_time", {})])


def test_a_mark_inside_a_call_of_another_format_is_its_argument() -> None:
    reply = (
        '<tool_call>{"name": "say", "arguments": {"x": "[TOOL_CALLS]a{}<tool_call>{}</tool_call><think>"}}</tool_call>'
    )
    assert summary(reply)[2] == [("say", {"x": "[TOOL_CALLS]a{}<tool_call>{}</tool_call><think>"})]


def test_without_tools_the_text_stays_text() -> None:
    reply = '\n{"name": "a", "parameters": {}}\n <tool_call>{"name": "get_time"}</tool_call> [TOOL_CALLS]a{} \n'
    parser, deltas = parse(list(reply), tools=())
    assert (parser.text, parser.tool_calls) == (reply, ())
    # Nothing but the space that might come before a thinking block is held back.
    assert [delta.text for delta in deltas[:3] if isinstance(delta, TextDelta)] == ["\n{", '"', "n"]


@pytest.mark.parametrize(
    ("reply", "starts", "expected"),
    [
        ("<think>\nHm.\n\nYes.\n</think>\n\nParis.\n", False, ("Hm.\n\nYes.", "Paris.\n", [])),
        ("  \n<think>a</think>b", False, ("a", "b", [])),
        ("Hm.\n</think>\n\nParis.", True, ("Hm.", "Paris.", [])),
        ("\n\nHm.</think>Paris.", True, ("Hm.", "Paris.", [])),
        ("<think>\nHm.</think>Paris.", True, ("Hm.", "Paris.", [])),
        ("<think><think>x</think>", True, ("<think>x", "", [])),
        ("\n</think>\n\nParis.", True, ("", "Paris.", [])),
        ("<think>\n\n</think>\n\n  Paris.", False, ("", "  Paris.", [])),
        ("never closed </thin", True, ("never closed </thin", "", [])),
        ("<think>", False, ("", "", [])),
        ("<thin", False, ("", "<thin", [])),
        (" \n", False, ("", " \n", [])),
        ("Use the <think>x</think> marks.", False, ("", "Use the <think>x</think> marks.", [])),
        ("a < b </think> c", False, ("", "a < b </think> c", [])),
        ("<think>a</think>\n<think>b</think>c", False, ("ab", "c", [])),
        (
            '<think>{"name": "a"} <tool_call></think>\n{"name": "get_time"}',
            False,
            ('{"name": "a"} <tool_call>', "", [TIME]),
        ),
        ('x</think>\n\n<tool_call>{"name": "get_time"}</tool_call>', True, ("x", "", [TIME])),
    ],
)
def test_reasoning(reply: str, starts: bool, expected: Summary) -> None:
    assert summary(reply, starts_in_reasoning=starts) == expected
    assert summary(list(reply), starts_in_reasoning=starts) == expected


def test_in_reasoning_follows_the_reply() -> None:
    parser = ReplyParser()
    states = []
    for piece in ("<think>", "Hm", "</thi", "nk>", "\nParis"):
        parser.push(piece)
        states.append(parser.in_reasoning)
    assert states == [True, True, True, False, False]
    assert ReplyParser(starts_in_reasoning=True).in_reasoning


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *('{"name": "a", "arguments": {"x": "</tool_call>"}}', '{"name": "b", "parameters": {}}', '{"k": 1}', "{}", "name"),
    *(
        "<function=f>",
        "<parameter=p>",
        "1",
        "</parameter>",
        "</function>",
        "{",
        "}",
        "[",
        "]",
        ";",
        '"',
        "<",
        "[T",
        "</th",
    ),
    *(" ", "\n", "\n\n", "é☃", "word"),
]


@st.composite
def cut_replies(draw: st.DrawFn) -> tuple[str, list[str]]:
    reply = "".join(draw(st.lists(st.sampled_from(FRAGMENTS), max_size=14)))
    cuts = sorted(draw(st.sets(st.integers(0, len(reply)), max_size=12)))
    return reply, [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(cut_replies(), st.booleans(), st.sampled_from(["tools", "no tools", "tool_parser"]))
def test_the_cutting_changes_nothing(cut: tuple[str, list[str]], starts: bool, mode: str) -> None:
    reply, pieces = cut
    settings_: dict[str, Any] = {"starts_in_reasoning": starts}
    if mode == "no tools":
        settings_["tools"] = ()
    elif mode == "tool_parser":
        settings_["tool_parser"] = lambda text: [ToolCall("p", {"n": len(text)})] * text.count("name")
    whole = joined(parse(reply, **settings_)[1])
    assert joined(parse(pieces, **settings_)[1]) == whole
    assert joined(parse(list(reply), **settings_)[1]) == whole


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="<>{}[]|/_ \nabtok\"';TOLCS", max_size=60))
def test_plain_text_is_untouched(text: str) -> None:
    reply = "Plain: " + text
    assert summary(list(reply)) == ("", reply, [])


def test_text_streams_as_soon_as_it_can_be_no_mark() -> None:
    parser = ReplyParser(tools=TOOLS)
    pieces = ["Hel", "lo ", "<b", " x", " <to", "ol>", "."]
    given_back = [parser.push(piece) for piece in pieces]
    assert given_back == [
        [TextDelta("Hel")],
        [TextDelta("lo")],  # the space might stand before a mark
        [TextDelta(" <b")],
        [TextDelta(" x")],
        [],
        [TextDelta(" <tool>")],
        [TextDelta(".")],
    ]


def test_a_call_comes_with_its_closing_mark() -> None:
    parser = ReplyParser(tools=TOOLS)
    assert parser.push('<tool_call>{"name": "get_time"}</tool_call') == []
    (delta,) = parser.push(">")
    assert isinstance(delta, ToolCallDelta)
    assert (delta.index, delta.call.name) == (0, "get_time")


def test_a_reply_in_json_streams_when_its_first_key_belongs_to_no_call() -> None:
    parser = ReplyParser(tools=TOOLS)
    assert parser.push('{"ans') == []
    assert parser.push('wer": ') == [TextDelta('{"answer":')]


def test_ids() -> None:
    made = parse('<tool_call>{"name": "a"}</tool_call>' * 3)[0].tool_calls
    assert all(re.fullmatch("call_[0-9a-f]{24}", call.id) for call in made)
    assert len({call.id for call in made}) == 3
    own = parse('[TOOL_CALLS][{"name": "a", "arguments": {}, "id": "abc123XYZ"}]')[0].tool_calls
    assert own[0].id == "abc123XYZ"
    assert parse("[TOOL_CALLS]a[CALL_ID]abc123XYZ[ARGS]{}")[0].tool_calls[0].id == "abc123XYZ"
    repeated = parse('[TOOL_CALLS][{"name": "a", "id": "1"}, {"name": "b", "id": "1"}]')[0].tool_calls
    assert repeated[0].id == "1" != repeated[1].id


class TestToolParser:
    """A user's function in place of the known formats."""

    @staticmethod
    def find(text: str) -> list[ToolCall]:
        return [ToolCall(name, {}) for name in re.findall(r"CALL (\w+)", text)]

    def test_text_is_held_from_the_first_mark_and_dropped_for_calls(self) -> None:
        parser = ReplyParser(tools=TOOLS, tool_parser=self.find)
        assert parser.push("I look. <tool_call>") == [TextDelta("I look.")]
        assert parser.push("CALL a CALL b") == []
        calls = [delta.call for delta in parser.finish() if isinstance(delta, ToolCallDelta)]
        assert [call.name for call in calls] == ["a", "b"]
        assert all(call.id.startswith("call_") for call in calls)
        assert parser.text == "I look."

    def test_held_text_comes_out_where_no_call_was_found(self) -> None:
        assert summary('A <tool_call>{"name": "get_time"}</tool_call>', tool_parser=self.find) == (
            "",
            'A <tool_call>{"name": "get_time"}</tool_call>',
            [],
        )

    def test_without_a_known_mark_the_text_streams_and_the_calls_follow(self) -> None:
        parser, deltas = parse(["CALL ", "a"], tool_parser=self.find)
        assert [type(delta) for delta in deltas] == [TextDelta, TextDelta, ToolCallDelta]
        assert parser.text == "CALL a"

    def test_it_gets_the_reply_without_reasoning(self) -> None:
        seen: list[str] = []
        parse("<think>Hm</think>\n\nA [TOOL_CALLS] b \n", tool_parser=lambda text: seen.append(text))
        assert seen == ["A [TOOL_CALLS] b \n"]

    def test_without_tools_it_is_not_asked(self) -> None:
        assert summary("CALL a", tools=(), tool_parser=self.find) == ("", "CALL a", [])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_MODEL)


class TestTokenizer:
    """The tokenizer tells whether unmarked JSON can be a call, and its tokens reach the parser whole."""

    def test_json_is_text_for_a_model_that_marks_its_calls(self, tokenizer: Any) -> None:
        reply = '{"name": "get_time", "parameters": {}}'
        assert summary(reply, tokenizer=tokenizer) == ("", reply, [])

    def test_a_reply_in_tokens(self, tokenizer: Any) -> None:
        reply = (
            '<think>\nWhich city?\n</think>\n\nI look — ☃.\n<tool_call>\n{"name": "get_weather", '
            '"arguments": {"city": "Zürich"}}\n</tool_call>'
        )

        def pieces() -> Iterator[str]:
            decoder = TokenDecoder(tokenizer)
            for token in [*tokenizer.encode(reply, add_special_tokens=False), tokenizer.eos_token_id]:
                yield decoder.push(token)
            yield decoder.flush()

        assert summary(list(pieces()), tokenizer=tokenizer) == (
            "Which city?",
            "I look — ☃.",
            [("get_weather", {"city": "Zürich"})],
        )


def test_a_long_call_is_read_in_reasonable_time() -> None:
    reply = '<tool_call>{"name": "write", "arguments": {"text": "' + "word {x} " * 4000 + '"}}</tool_call>'
    started = time.perf_counter()
    assert len(summary(re.findall(r"(?s).{1,4}", reply))[2]) == 1
    assert time.perf_counter() - started < 10

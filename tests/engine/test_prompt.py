"""Conversations become token ids through the chat template, or a clear error before anything is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from turboquant_local.engine.prompt import opens_reasoning, render_prompt
from turboquant_local.engine.types import GenerationOptions, Message, Tool, ToolCall
from turboquant_local.errors import (
    ChatTemplateError,
    EmptyConversationError,
    GenerationOptionError,
    PromptError,
    ToolSchemaError,
)

TINY = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples" / "tiny-model")
USER = Message("user", "What is the weather in Paris?")
WEATHER = Tool("get_weather", "The weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = ToolCall("get_weather", {"city": "Paris", "days": [1, {"a": None}]}, "call_0123456789abcdef")
CALLED = (USER, Message("assistant", tool_calls=(CALL,)), Message("tool", "Sunny.", tool_call_id=CALL.id))

# In the manner of well-known models.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
MISTRAL = (
    "[AVAILABLE_TOOLS]{{ tools | tojson }}{% for m in messages %}"
    "{% set ids = [m.tool_call_id] if m.role == 'tool' else (m.tool_calls or []) | map(attribute='id') | list %}"
    "{% for id in ids %}"
    "{% if id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{% endif %}({{ id }}){% endfor %}{% endfor %}"
)
SHOW_ALL = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"


def render(
    *messages: Message, tools: tuple[Tool, ...] = (), tokenizer: Any = TINY, template: str | None = None, **options: Any
) -> str:
    token_ids = render_prompt(
        tokenizer, messages, tools=tools, options=GenerationOptions(**options), chat_template=template
    )
    assert all(type(token_id) is int for token_id in token_ids)
    return str(tokenizer.decode(token_ids))


def test_a_conversation_with_the_opening_of_the_reply() -> None:
    assert render(Message("system", "Be brief."), USER, Message("assistant", "Sunny."), Message("user", "Thanks!")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is the weather in Paris?<|im_end|>\n"
        "<|im_start|>assistant\nSunny.<|im_end|>\n<|im_start|>user\nThanks!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tools_calls_and_results() -> None:
    text = render(*CALLED, tools=(WEATHER,))
    assert '{"type": "function", "function": {"name": "get_weather", "description": "The weather."' in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": [1, {"a": null}]}}\n' in text
    assert "<tool_response>\nSunny.\n</tool_response>" in text


def test_messages_in_the_form_of_transformers() -> None:
    thinking = Message("assistant", "Sunny.", reasoning="Hm.")
    lines = render(*CALLED, thinking, Message("user", "And?", name="Ann"), template=SHOW_ALL).splitlines()
    assert lines[1:3] == [
        '{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "call_0123456789abcdef", '
        '"function": {"name": "get_weather", "arguments": {"city": "Paris", "days": [1, {"a": null}]}}}]}',
        '{"role": "tool", "content": "Sunny.", "name": "get_weather", "tool_call_id": "call_0123456789abcdef"}',
    ]
    assert '"reasoning_content": "Hm."' in lines[3]
    assert lines[4] == '{"role": "user", "content": "And?", "name": "Ann"}'


def test_thinking_is_passed_only_when_given() -> None:
    template = "{{ 'none' if enable_thinking is not defined else enable_thinking }} {{ style | default('plain') }}"
    assert render(USER, template=template) == "none plain"
    assert render(USER, template=template, enable_thinking=False) == "False plain"
    assert render(USER, template=template, enable_thinking=True, template_kwargs={"style": "x"}) == "True x"


def test_the_template_alone_decides_about_the_bos() -> None:
    base = Tokenizer(models.WordLevel({"<s>": 0, "hi": 1, "[UNK]": 2}, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    base.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", unk_token="[UNK]")
    assert tokenizer("hi").input_ids == [0, 1]
    hi = [Message("user", "hi")]
    for template, expected in (("{{ bos_token }} hi", [0, 1]), ("{{ 'hi' }}", [1])):
        assert render_prompt(tokenizer, hi, options=GenerationOptions(), chat_template=template) == expected


def test_a_template_by_name() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY.name_or_path)
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools: {{ tools }}", "other": "other"}
    assert render(USER, tokenizer=tokenizer) == "plain"
    assert render(USER, tokenizer=tokenizer, template="other") == "other"
    assert render(USER, tokenizer=tokenizer, tools=(WEATHER,)).startswith("tools: ")


def test_call_ids_are_shortened_only_for_a_template_that_insists() -> None:
    text = render(*CALLED, tools=(WEATHER,), template=MISTRAL)
    first, second = text.rsplit("(", 2)[1:]
    assert first == second
    assert len(first.strip(")")) == 9
    assert first.strip(")").isalnum()
    assert text == render(*CALLED, tools=(WEATHER,), template=MISTRAL)
    own = ToolCall("get_weather", {}, "abcDEF123")
    messages = (USER, Message("assistant", tool_calls=(own,)), Message("tool", "x", tool_call_id=own.id))
    assert render(*messages, tools=(WEATHER,), template=MISTRAL).endswith("(abcDEF123)(abcDEF123)")


def test_calls_without_ids_can_be_answered() -> None:
    call = ToolCall("get_weather", {})
    assert "Sunny." in render(USER, Message("assistant", tool_calls=(call,)), Message("tool", "Sunny."))


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ((USER, Message("tool", "Sunny.", tool_call_id="call_x")), r"messages\[1\].*'call_x'.*none"),
        ((*CALLED, Message("tool", "Rain.", tool_call_id="call_y")), r"messages\[3\].*'call_y'.*call_0123456789abcdef"),
        ((USER, Message("tool", "Sunny.")), r"messages\[1\].*None"),
        ((CALLED[0], CALLED[2], CALLED[1]), r"messages\[1\]"),
    ],
)
def test_a_result_without_its_call(messages: tuple[Message, ...], found: str) -> None:
    with pytest.raises(PromptError, match=found):
        render(*messages)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"role": "user", "content": "Hi"}, r"messages\[0\]={.*expected a Message, such as Message\('user', 'Hello'\)"),
        (Message("bot", "Hi"), r"messages\[0\].role='bot': expected one of system, user, assistant, tool"),
        (Message("user", None), r"messages\[0\].content=None: expected a string"),
        (Message("assistant", tool_calls=({"name": "f"},)), r"messages\[0\].tool_calls: expected ToolCall.*got {"),
        (Message("assistant", tool_calls=(ToolCall("f", "{}", "1"),)), r"messages\[0\].tool_calls: .*arguments='{}'"),
    ],
)
def test_what_is_no_message(message: Any, found: str) -> None:
    with pytest.raises(PromptError, match=found):
        render(message)


def test_half_a_character() -> None:
    with pytest.raises(PromptError, match=r"messages or tools: '.*Hi \\ud83d' ends in half a character"):
        render(Message("user", "Hi \ud83d!"))


def test_an_empty_conversation() -> None:
    with pytest.raises(EmptyConversationError, match="messages: expected at least one"):
        render()


def test_no_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY.name_or_path)
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match=r"tiny-model has no chat template.*chat_template="):
        render(USER, tokenizer=tokenizer)
    assert render(USER, tokenizer=tokenizer, template="{{ messages[0].content }}") == USER.content


@pytest.mark.parametrize(
    ("template", "messages", "found"),
    [
        (GEMMA, (Message("system", "x"), USER), "roles: system, user.*System role not supported.*first user message"),
        (
            "{{ raise_exception('Roles must alternate') }}",
            (USER, USER),
            "roles: user, user.*Roles must alternate.*chat",
        ),
        ("{{ missing.field }}", (USER,), "'missing' is undefined.*chat_template_kwargs"),
        ("{% if %}", (USER,), "Expected an expression"),
        ("{{ 1 + messages[0].content }}", (USER,), "unsupported operand"),
    ],
)
def test_a_template_that_refuses(template: str, messages: tuple[Message, ...], found: str) -> None:
    with pytest.raises(ChatTemplateError, match=found):
        render(*messages, template=template)


@pytest.mark.parametrize("message", ["What is the weather in Paris?", "Use get_weather."])
def test_a_template_that_ignores_tools(message: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"leaves out get_weather.*supports tools"):
        render(Message("user", message), tools=(WEATHER,), template=GEMMA)


def test_a_template_that_shows_only_some_tools() -> None:
    clock = Tool("get_time", "", {"type": "object", "properties": {}})
    with pytest.raises(ChatTemplateError, match="leaves out get_time,"):
        render(USER, tools=(WEATHER, clock), template="{{ tools[0] | tojson }}")


@pytest.mark.parametrize("template", ["", "chat_template.jinja"])
def test_no_template_at_all(template: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"chat_template='{template}': expected the text of a Jinja template"):
        render(USER, template=template)


def test_a_template_that_writes_nothing() -> None:
    with pytest.raises(ChatTemplateError, match="writes nothing"):
        render(USER, template="{% if false %}x{% endif %}")


def test_a_template_that_cannot_do_without_tools() -> None:
    assert "get_weather" in render(USER, tools=(WEATHER,), template="{{ tools[0] | tojson }}")


def test_a_broken_tool_is_refused_before_rendering() -> None:
    with pytest.raises(ToolSchemaError, match="get_weather"):
        render(USER, tools=(WEATHER, WEATHER))
    with pytest.raises(ToolSchemaError, match=r"tools\[0\]={'name': 'a'}: expected Tool"):
        render(USER, tools=({"name": "a"},))


@pytest.mark.parametrize("name", ["tokenize", "messages", "tools", "add_generation_prompt"])
def test_template_kwargs_cannot_replace_what_rendering_sets(name: str) -> None:
    with pytest.raises(GenerationOptionError, match=f"template_kwargs.*{name}"):
        render(USER, template_kwargs={name: False})


def test_opens_reasoning() -> None:
    def opened(template: str | None = None, **options: Any) -> bool:
        written = template and "{# written #}" + template
        prompt = render_prompt(TINY, [USER], options=GenerationOptions(**options), chat_template=written)
        return opens_reasoning(TINY, prompt)

    assert opened(enable_thinking=True)
    assert not opened(enable_thinking=False)
    assert not opened()
    assert opened("a <think>")
    assert opened("<think>\n\n")
    assert not opened("<think>\n\n</think>\n\n")
    assert not opened("<think> what is it")
    assert not opens_reasoning(TINY, [])

"""Does the model still call tools in a valid form? Requests that name the tool and its arguments."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from turboquant_local.engine.loading import LoadedModel
from turboquant_local.engine.parsing import ReplyParser
from turboquant_local.engine.prompt import render_prompt
from turboquant_local.engine.types import GenerationOptions, Message, Tool, ToolCall
from turboquant_local.evaluation.codecs.base import KVCodec
from turboquant_local.evaluation.decoding import Prompt, decode
from turboquant_local.evaluation.words import WORDS

_VERBS: Final = ("get", "set", "find", "create", "update", "send", "check", "list")
_REPLY: Final = 128
"""Tokens of the longest reply."""


@dataclass(frozen=True)
class ToolRequest:
    """A request, the tools that are offered, and the call that answers it."""

    text: str
    tools: tuple[Tool, ...]
    call: ToolCall


@dataclass(frozen=True)
class ToolCallScore:
    """Replies of one codec to requests for tools.

    Attributes:
        codec: Name of the codec.
        valid: Replies with one call that can be parsed.
        correct: Replies whose call has the expected name and arguments.
        total: Requests.
    """

    codec: str
    valid: int
    correct: int
    total: int


def make_requests(count: int, seed: int = 0) -> list[ToolRequest]:
    """Requests of the same kind; the same arguments give the same requests."""
    return [_request(random.Random(f"tools {seed} {index}")) for index in range(count)]


def _request(rng: random.Random) -> ToolRequest:
    names = [f"{rng.choice(_VERBS)}_{word}" for word in rng.sample(WORDS, 4)]
    tools = tuple(_tool(rng, name) for name in names)
    asked = rng.choice(tools)
    arguments: dict[str, Any] = {
        name: rng.randint(10, 9999) if kind["type"] == "integer" else rng.choice(WORDS)
        for name, kind in asked.parameters["properties"].items()
    }
    given = " and ".join(f"{name} {value}" for name, value in arguments.items())
    return ToolRequest(f"Call {asked.name} with {given}.", tools, ToolCall(asked.name, arguments))


def _tool(rng: random.Random, name: str) -> Tool:
    fields = rng.sample(("city", "name", "title", "color", "product", "topic"), rng.randint(1, 2))
    numbers = rng.sample(("count", "limit", "year", "amount"), 1)
    properties = {
        **{field: {"type": "string", "description": f"The {field}"} for field in fields},
        **{field: {"type": "integer", "description": f"The {field}"} for field in numbers},
    }
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return Tool(name, f"Use this to {name.replace('_', ' ')}.", parameters)


def measure_tool_calls(
    loaded: LoadedModel,
    codecs: Sequence[KVCodec],
    *,
    samples: int = 50,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> list[ToolCallScore]:
    """Let a model call tools whose descriptions it reads from a compressed cache.

    Four tools are offered and one is named with its arguments; the request is asked as the second part of the
    prompt, so that it sees the descriptions compressed. Put `UNCOMPRESSED` among the codecs for the baseline.

    Args:
        loaded: A chat model whose template shows tools.
        codecs: What to measure.
        samples: Requests.
        seed: Other seeds give other requests.
        on_progress: Called with a codec's name after each request.

    Raises:
        ChatTemplateError: The tokenizer has no chat template, or one that leaves tools out.
    """
    valid, correct = dict.fromkeys((c.name for c in codecs), 0), dict.fromkeys((c.name for c in codecs), 0)
    for request in make_requests(samples, seed):
        prompt = _prompt(loaded.tokenizer, request)
        for codec in codecs:
            (reply,) = decode(loaded, [prompt], codec, max_new_tokens=_REPLY)
            calls = parse(reply, request.tools, loaded.tokenizer)
            valid[codec.name] += len(calls) == 1
            correct[codec.name] += [(call.name, call.arguments) for call in calls] == [
                (request.call.name, request.call.arguments)
            ]
            if on_progress is not None:
                on_progress(codec.name)
    return [ToolCallScore(codec.name, valid[codec.name], correct[codec.name], samples) for codec in codecs]


def parse(reply: str, tools: Sequence[Tool], tokenizer: Any) -> tuple[ToolCall, ...]:
    """The calls in a reply, read as the engine reads them."""
    parser = ReplyParser(tools=tools, tokenizer=tokenizer)
    parser.push(reply)
    parser.finish()
    return parser.tool_calls


def _prompt(tokenizer: Any, request: ToolRequest) -> Prompt:
    options = GenerationOptions(enable_thinking=False)
    ids = render_prompt(tokenizer, [Message("user", request.text)], tools=request.tools, options=options)
    # The same conversation without the request: what both have in common at the start is the description of tools.
    other = render_prompt(tokenizer, [Message("user", "?")], tools=request.tools, options=options)
    common = next(index for index, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b)
    return Prompt(ids, len(ids) - common, request.call.name)

"""What goes into the engine and what comes out: messages, tools, options, events, reply, metrics.

Both adapters convert to and from these types; nothing here imports a framework.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

JSON: TypeAlias = "str | int | float | bool | list[JSON] | dict[str, JSON] | None"

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class ToolCall:
    """A call the model asks for.

    Attributes:
        name: The tool's name.
        arguments: The arguments as parsed JSON.
        id: An identifier that ties the tool's result to this call.
    """

    name: str
    arguments: dict[str, JSON]
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: The text.
        tool_calls: Calls an assistant turn made.
        tool_call_id: For role "tool": the call this is the result of.
        name: For role "tool": the tool's name; otherwise an optional speaker's name.
        reasoning: An assistant turn's thinking, for templates that want it back.
    """

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None


def failed_result(text: str) -> str:
    """The result of a tool that failed. Chat templates have no field for a failure, so the text says it."""
    return text if text.lower().startswith("error") else f"Error: {text}"


@dataclass(frozen=True)
class Tool:
    """A function the model may call.

    Attributes:
        name: Its name.
        description: What it does, in words.
        parameters: JSON schema of its arguments (type "object").
    """

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How one reply is generated. None means the model's own generation config.

    Attributes:
        max_new_tokens: Most tokens to generate; never past the model's context.
        do_sample: Sample instead of taking the most probable token. A temperature above 0 alone implies it.
        temperature: Above 0; 0 means greedy.
        top_k: Keep this many most probable tokens.
        top_p: Keep the smallest set of tokens with at least this probability.
        min_p: Keep tokens at least this probable, relative to the best one.
        repetition_penalty: Above 1 discourages repeats.
        seed: Makes sampling repeatable; it never touches the process-wide random state.
        stop: Strings that end the reply; they are left out of it. Empty: not given.
        response_format: What the text must be, in OpenAI's words: `{"type": "text"}`, `{"type": "json_object"}` or
            `{"type": "json_schema", "json_schema": {"schema": {...}}}`.
        tool_choice: None or "auto": the model decides; "none": no call; "required": at least one call; any other
            string: the name of the tool to call.
        parallel_tool_calls: False: at most one call in a reply whose form is forced.
        enable_thinking: Passed to the chat template of models that can think.
        template_kwargs: Further variables of the chat template.
        extra: Other fields of transformers' `GenerationConfig`, by name.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    response_format: Mapping[str, Any] | None = None
    tool_choice: str | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextDelta:
    """A piece of the reply's text."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """A piece of the model's thinking."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A complete tool call, given as soon as its closing mark has been read.

    Attributes:
        index: 0 for the first call of the reply.
        call: The call.
    """

    index: int
    call: ToolCall


@dataclass(frozen=True)
class Usage:
    """Tokens, counted from ids.

    Attributes:
        prompt_tokens: Tokens of the rendered prompt.
        completion_tokens: Generated tokens, the end token included.
        cached_tokens: Prompt tokens that were already in the KV cache.
        reasoning_tokens: Generated tokens that belong to the thinking.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class GenerationMetrics:
    """What one generation cost. Times in seconds, sizes in bytes.

    Attributes:
        ttft: From the request (with the model loaded) to the first generated token; 0.0 when there was none.
        tokens_per_second: Decode only: tokens after the first over the time after the first; 0.0 below two tokens.
        total_time: From the request to the last token.
        prompt_tokens: Tokens of the rendered prompt.
        completion_tokens: Generated tokens.
        cached_tokens: Prompt tokens that were already in the KV cache.
        cache_tokens: Tokens the KV cache holds at the end.
        vram_bytes: All tensors the KV cache keeps alive at the end; with a CUDA graph, room for more tokens included.
        uncompressed_bytes: What transformers' own cache would hold for the same tokens.
        compression_ratio: uncompressed_bytes / vram_bytes.
        peak_device_memory: Highest memory allocated on the accelerator during the call; None on a CPU.
        attention: Attention paths that ran, with how many calls each: "exact" (nothing was packed yet), "triton" or
            "reference" (plain torch).
        packing: What packed tokens, "triton" or "reference" (plain torch), with how many calls each.
        materialized: How often a layer's keys or values had to be decompressed as a whole; 0 is right.
        bypassed_layers: Layers left uncompressed, with the reason: {"3": "sliding window"}.
        decoding: How tokens after the first were made: "cuda graph"; "eager: " and the reason why not; "static", the
            graph's step run as it is; "" if there were none.
        device: Where the model ran.
        dtype: Its dtype.
        kv_cache: The settings of the cache.
    """

    ttft: float
    tokens_per_second: float
    total_time: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_tokens: int
    vram_bytes: int
    uncompressed_bytes: int
    compression_ratio: float
    peak_device_memory: int | None
    attention: dict[str, int]
    packing: dict[str, int]
    materialized: int
    bypassed_layers: dict[str, str]
    decoding: str
    device: str
    dtype: str
    kv_cache: dict[str, str | int | bool]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON-safe values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ChatReply:
    """A finished reply.

    Attributes:
        text: The answer, without thinking, tool calls and stop string.
        reasoning: The thinking, or "".
        tool_calls: The calls asked for, in order.
        finish_reason: Why it ended.
        usage: Token counts.
        metrics: What it cost.
        token_ids: The generated ids.
        first_token_at: Wall clock of the first token, as ISO 8601 with timezone; "" when there was none.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    metrics: GenerationMetrics
    token_ids: tuple[int, ...]
    first_token_at: str

    @property
    def openai_finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        """`finish_reason` in the words of OpenAI's API, which has none for a cancelled reply: it simply stops."""
        return "stop" if self.finish_reason == "cancelled" else self.finish_reason


@dataclass(frozen=True)
class Finished:
    """The last event of a stream."""

    reply: ChatReply


Delta: TypeAlias = TextDelta | ReasoningDelta | ToolCallDelta
StreamEvent: TypeAlias = Delta | Finished

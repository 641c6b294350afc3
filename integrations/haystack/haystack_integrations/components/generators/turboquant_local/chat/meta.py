"""What a reply says about itself: Haystack's meta, token usage, and tags on the current tracing span."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from haystack.tracing.tracer import tracer

from turboquant_local.engine.types import ChatReply, GenerationMetrics, Usage

TAG_PREFIX: Final = "haystack.turboquant_local."
"""Prefix of the tracing tags."""

TAGGED: Final = (
    "ttft",
    "tokens_per_second",
    "total_time",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "vram_bytes",
    "uncompressed_bytes",
    "compression_ratio",
    "device",
)
"""Metrics that become tracing tags; backends want plain numbers and strings."""


def now() -> str:
    """The wall clock as ISO 8601 with timezone."""
    return datetime.now(UTC).isoformat()


def usage_dict(usage: Usage) -> dict[str, Any]:
    """Token counts in OpenAI's shape; all leaves are counts, because the Agent sums them over its steps."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def reply_meta(reply: ChatReply, model: str, requested_at: str) -> dict[str, Any]:
    """Meta of a finished reply, JSON-safe.

    Args:
        reply: What the engine generated.
        model: Name or folder of the model.
        requested_at: Wall clock of the request, ISO 8601; `MetricsCallback` measures from there.
    """
    return {
        "model": model,
        "index": 0,
        "finish_reason": reply.openai_finish_reason,
        "completion_start_time": reply.first_token_at,
        "usage": usage_dict(reply.usage),
        "turboquant": {"requested_at": requested_at, **reply.metrics.to_dict()},
    }


def tag_current_span(metrics: GenerationMetrics) -> None:
    """Put the metrics on the span that is being traced, if any: the component's own, inside a pipeline."""
    span = tracer.current_span()
    if span is not None:
        span.set_tags({TAG_PREFIX + name: getattr(metrics, name) for name in TAGGED})

"""A streaming callback that measures what the caller sees."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from haystack import default_from_dict, default_to_dict
from haystack.dataclasses import StreamingCallbackT, StreamingChunk
from haystack.utils import deserialize_callable, serialize_callable

from haystack_integrations.components.generators.turboquant_local.chat.settings import check_kinds


@dataclass(frozen=True)
class StreamMetrics:
    """One streamed reply, as its callback saw it. Times in seconds.

    Attributes:
        model: Name or folder of the model.
        ttft: From the request to the first chunk.
        total_time: From the request to the last chunk.
        tokens_per_second: Generated tokens over `total_time`: the speed a user feels, prompt and waiting included.
            The decode speed alone is `engine["tokens_per_second"]`.
        chunks: Chunks seen.
        usage: Token counts of the reply.
        engine: The engine's own metrics: `meta["turboquant"]` of the reply.
    """

    model: str
    ttft: float
    total_time: float
    tokens_per_second: float
    chunks: int
    usage: dict[str, Any] = field(repr=False)
    engine: dict[str, Any] = field(repr=False)

    def summary(self) -> str:
        """One line for people."""
        engine = self.engine
        return (
            f"first chunk after {self.ttft:.2f} s, {self.tokens_per_second:.1f} tokens/s "
            f"(decode {engine['tokens_per_second']:.1f}), {engine['prompt_tokens']} + {engine['completion_tokens']} "
            f"tokens, {engine['cached_tokens']} of them cached, KV cache {engine['vram_bytes']:,} B instead of "
            f"{engine['uncompressed_bytes']:,} B ({engine['compression_ratio']:.2f}x)"
        )


class MetricsCallback:
    """A `streaming_callback` that keeps one `StreamMetrics` a reply, and hands every chunk on.

    It serves `run` and `run_async`, several at once too, and an Agent, whose tool results it ignores. It is not
    copied when a pipeline copies its inputs, so what it measures reaches the object that you hold.

    In YAML it stands in the chat generator's own `streaming_callback`, also below an Agent: Haystack writes out other
    components' callbacks only if they are functions.

    Args:
        then: A callback that gets every chunk as well, such as
            `haystack.components.generators.utils.print_streaming_chunk`. If it is async, use `run_async`.

    Attributes:
        replies: What was measured, oldest reply first.

    Raises:
        ConfigError: `then` cannot be called.
    """

    def __init__(self, then: StreamingCallbackT | None = None) -> None:
        check_kinds(then=then)
        self.then = then
        self.replies: list[StreamMetrics] = []
        self._open: dict[int, tuple[float, int]] = {}

    def __call__(self, chunk: StreamingChunk) -> Awaitable[None] | None:
        """Take one chunk; returns what `then` returned, for the component to await."""
        if chunk.tool_call_result is None:
            self._measure(chunk)
        return self.then(chunk) if self.then is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> MetricsCallback:
        """Itself: pipelines deep-copy their inputs, and a copy would keep the metrics from the caller."""
        return self

    @property
    def last(self) -> StreamMetrics | None:
        """The reply that ended last, if any."""
        return self.replies[-1] if self.replies else None

    def summary(self) -> str:
        """One line a reply."""
        return "\n".join(metrics.summary() for metrics in self.replies) or "no reply was streamed"

    def to_dict(self) -> dict[str, Any]:
        """Settings, for a pipeline's YAML; measurements are left out."""
        then = self.then
        return default_to_dict(
            self, then=then.to_dict() if isinstance(then, MetricsCallback) else then and serialize_callable(then)
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MetricsCallback:
        """Read back what `to_dict` wrote."""
        parameters = dict(data.get("init_parameters") or {})
        if isinstance(parameters.get("then"), str):
            parameters["then"] = deserialize_callable(parameters["then"])
        callback: MetricsCallback = default_from_dict(cls, {**data, "init_parameters": parameters})
        return callback

    def _measure(self, chunk: StreamingChunk) -> None:
        now, stream = time.time(), _current_stream()
        first, seen = self._open.pop(stream, (now, 0))
        if chunk.start and not chunk.index:  # a new reply; an abandoned one may have left its count here
            first, seen = now, 0
        engine = chunk.meta.get("turboquant")
        if engine is None:
            self._open[stream] = (first, seen + 1)
            return
        requested = datetime.fromisoformat(engine["requested_at"]).timestamp()
        self.replies.append(
            StreamMetrics(
                model=chunk.meta["model"],
                ttft=first - requested,
                total_time=now - requested,
                tokens_per_second=engine["completion_tokens"] / max(now - requested, 1e-9),
                chunks=seen + 1,
                usage=chunk.meta["usage"],
                engine=engine,
            )
        )


def _current_stream() -> int:
    """What tells concurrent replies apart: a component calls back in the task, or else the thread, of its caller."""
    try:
        return id(asyncio.current_task())
    except RuntimeError:
        return threading.get_ident()

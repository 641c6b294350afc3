"""A callback handler that keeps what each run of the model cost, and what all of them cost together."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, GenerationChunk, LLMResult
from langchain_core.tracers.context import register_configure_hook


@dataclass(frozen=True)
class RunMetrics:
    """One run of the model. Times in seconds, sizes in bytes.

    Attributes:
        run_id: LangChain's id of the run.
        model: Name or folder of the model.
        ttft: From the start of the run to the first piece of text, thinking or tool call that a caller could see,
            loading and waiting included.
        total_time: From the start of the run to its end.
        tokens_per_second: The engine's decode speed.
        input_tokens: Tokens of the prompt.
        output_tokens: Generated tokens.
        cached_tokens: Tokens of the prompt that were already in the KV cache.
        vram_bytes: All tensors that the KV cache kept alive at the end.
        uncompressed_bytes: What transformers' own cache would hold for the same tokens.
        engine: All of the engine's metrics: `response_metadata["turboquant"]`.
    """

    run_id: UUID
    model: str
    ttft: float
    total_time: float
    tokens_per_second: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    vram_bytes: int
    uncompressed_bytes: int
    engine: dict[str, Any] = field(repr=False)

    @property
    def compression_ratio(self) -> float:
        """How many times smaller the cache was than transformers' own."""
        return self.uncompressed_bytes / self.vram_bytes if self.vram_bytes else 1.0


@dataclass(frozen=True)
class TotalMetrics:
    """Several runs together. Times in seconds, sizes in bytes.

    Attributes:
        runs: How many.
        ttft: Mean time to the first token.
        total_time: Sum of the runs' times; runs at the same time count each.
        tokens_per_second: Tokens decoded over the time they took.
        input_tokens: Sum.
        output_tokens: Sum.
        cached_tokens: Sum.
        vram_bytes: Of the run with the largest cache.
        compression_ratio: What transformers' own caches would have held, over what ours held.
    """

    runs: int
    ttft: float
    total_time: float
    tokens_per_second: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    vram_bytes: int
    compression_ratio: float

    @classmethod
    def of(cls, runs: list[RunMetrics]) -> TotalMetrics:
        """Sum up runs; all zeros, and a ratio of 1, for none."""
        decoded = [run for run in runs if run.tokens_per_second > 0]
        decode_time = sum((run.output_tokens - 1) / run.tokens_per_second for run in decoded)
        stored = sum(run.vram_bytes for run in runs)
        return cls(
            runs=len(runs),
            ttft=sum(run.ttft for run in runs) / max(len(runs), 1),
            total_time=sum(run.total_time for run in runs),
            tokens_per_second=sum(run.output_tokens - 1 for run in decoded) / decode_time if decoded else 0.0,
            input_tokens=sum(run.input_tokens for run in runs),
            output_tokens=sum(run.output_tokens for run in runs),
            cached_tokens=sum(run.cached_tokens for run in runs),
            vram_bytes=max((run.vram_bytes for run in runs), default=0),
            compression_ratio=sum(run.uncompressed_bytes for run in runs) / stored if stored else 1.0,
        )


@dataclass
class _OpenRun:
    started: float
    first_token: float | None = None


class TurboQuantMetricsCallbackHandler(BaseCallbackHandler):
    """Keeps the metrics of every finished run of `ChatTurboQuantLocal`; other models' runs pass by.

    One handler may watch many runs at once. `get_turboquant_callback` puts one around a block of code.

    Example::

        handler = TurboQuantMetricsCallbackHandler()
        model.invoke("Hello", config={"callbacks": [handler]})
        print(handler.runs[-1].ttft, handler.total.compression_ratio)
    """

    # In the thread or task that generates, one call after another: that is what times and order need.
    run_inline = True

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._open: dict[UUID, _OpenRun] = {}
        self._runs: list[RunMetrics] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.total})"

    @property
    def runs(self) -> list[RunMetrics]:
        """What was measured, the run that ended first first."""
        with self._lock:
            return list(self._runs)

    @property
    def total(self) -> TotalMetrics:
        """All runs together."""
        return TotalMetrics.of(self.runs)

    def on_chat_model_start(
        self, serialized: dict[str, Any], messages: list[list[BaseMessage]], *, run_id: UUID, **kwargs: Any
    ) -> None:
        """Start the clock of a run."""
        with self._lock:
            self._open[run_id] = _OpenRun(time.perf_counter())

    def on_llm_new_token(
        self,
        token: str | list[str | dict[str, Any]],
        *,
        chunk: GenerationChunk | ChatGenerationChunk | None = None,
        run_id: UUID,
        **kwargs: Any,
    ) -> None:
        """Note the first chunk that shows something."""
        now = time.perf_counter()
        if chunk is not None and not (isinstance(chunk, ChatGenerationChunk) and _shows_something(chunk.message)):
            return
        with self._lock:
            run = self._open.get(run_id)
            if run is not None and run.first_token is None:
                run.first_token = now

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Keep what the run cost."""
        now = time.perf_counter()
        with self._lock:
            run = self._open.pop(run_id, None)
            if run is not None and (message := _engine_message(response)) is not None:
                self._runs.append(_measured(run_id, run, message, now))

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a run that failed or was closed."""
        with self._lock:
            self._open.pop(run_id, None)


@contextmanager
def get_turboquant_callback(
    name: str = "turboquant_callback",
) -> Generator[TurboQuantMetricsCallbackHandler, None, None]:
    """Measure every run inside a `with` block, wherever in a chain or agent it happens.

    Args:
        name: Name of the context variable.

    Yields:
        The handler that gathers the metrics.
    """
    variable: ContextVar[TurboQuantMetricsCallbackHandler | None] = ContextVar(name, default=None)
    register_configure_hook(variable, inheritable=True)
    handler = TurboQuantMetricsCallbackHandler()
    token = variable.set(handler)
    try:
        yield handler
    finally:
        variable.reset(token)


def _shows_something(message: BaseMessage) -> bool:
    return bool(
        message.content
        or message.additional_kwargs.get("reasoning_content")
        or (isinstance(message, AIMessageChunk) and message.tool_call_chunks)
    )


def _engine_message(response: LLMResult) -> AIMessage | None:
    """The reply, if our engine generated it just now; None for other models and for what LangChain had cached."""
    generation = response.generations[0][0] if response.generations and response.generations[0] else None
    message = generation.message if isinstance(generation, ChatGeneration) else None
    if not isinstance(message, AIMessage) or "turboquant" not in message.response_metadata:
        return None
    # LangChain marks a reply from its cache by a cost of 0, and in no other way.
    return None if "total_cost" in (message.usage_metadata or {}) else message


def _measured(run_id: UUID, run: _OpenRun, message: AIMessage, now: float) -> RunMetrics:
    engine = message.response_metadata["turboquant"]
    return RunMetrics(
        run_id=run_id,
        model=message.response_metadata["model_name"],
        ttft=(run.first_token or now) - run.started,
        total_time=now - run.started,
        tokens_per_second=engine["tokens_per_second"],
        input_tokens=engine["prompt_tokens"],
        output_tokens=engine["completion_tokens"],
        cached_tokens=engine["cached_tokens"],
        vram_bytes=engine["vram_bytes"],
        uncompressed_bytes=engine["uncompressed_bytes"],
        engine=engine,
    )

"""What one generation cost: a stopwatch, the accelerator's peak memory, and the figures of the cache."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch

from turboquant_local.cache import TurboQuantCache
from turboquant_local.config import TurboQuantConfig
from turboquant_local.engine.types import GenerationMetrics, Usage


@dataclass
class Stopwatch:
    """Times of one generation, in seconds of a monotonic clock.

    Attributes:
        started: When the request came; the model was loaded.
        first_token: When the first token was known; None before.
        last_token: When the last token was known; None before.
        first_token_at: Wall clock of the first token, as ISO 8601 with timezone; "" before.
    """

    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    last_token: float | None = None
    first_token_at: str = ""

    def token(self) -> None:
        """Note that a token is known."""
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
            self.first_token_at = datetime.now(UTC).isoformat()

    @property
    def ttft(self) -> float:
        """From the request to the first token; 0.0 without one."""
        return 0.0 if self.first_token is None else self.first_token - self.started

    @property
    def total_time(self) -> float:
        """From the request to the last token; 0.0 without one."""
        return 0.0 if self.last_token is None else self.last_token - self.started

    def tokens_per_second(self, tokens: int) -> float:
        """Tokens after the first over the time after the first; 0.0 below two tokens."""
        decode_time = self.total_time - self.ttft
        return (tokens - 1) / decode_time if tokens > 1 and decode_time > 0 else 0.0


def start_peak_memory(device: torch.device) -> None:
    """Begin to watch the memory that torch allocates on an accelerator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes allocated since `start_peak_memory`; None where torch does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def collect_metrics(
    stopwatch: Stopwatch,
    usage: Usage,
    cache: TurboQuantCache | None,
    kv_cache: TurboQuantConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    peak_device_memory: int | None,
    decoding: str,
) -> GenerationMetrics:
    """Put the figures of one generation together; without a cache (nothing ran) its figures are 0."""
    return GenerationMetrics(
        ttft=stopwatch.ttft,
        tokens_per_second=stopwatch.tokens_per_second(usage.completion_tokens),
        total_time=stopwatch.total_time,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        cache_tokens=int(cache.get_seq_length()) if cache is not None else 0,
        vram_bytes=cache.vram_bytes() if cache is not None else 0,
        uncompressed_bytes=cache.uncompressed_bytes() if cache is not None else 0,
        compression_ratio=cache.compression_ratio() if cache is not None else 1.0,
        peak_device_memory=peak_device_memory,
        attention=dict(cache.stats.attention) if cache is not None else {},
        packing=dict(cache.stats.packing) if cache is not None else {},
        materialized=cache.stats.materialized if cache is not None else 0,
        bypassed_layers=dict(cache.bypassed) if cache is not None else {},
        decoding=decoding,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        kv_cache=kv_cache.to_dict(),
    )

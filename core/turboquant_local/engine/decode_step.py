"""One step of decoding: a token goes in, the scores of the next come out, by a CUDA graph where it can be captured."""

from __future__ import annotations

import inspect
from collections import Counter
from functools import lru_cache
from threading import Lock
from typing import Any, Final

import torch

from turboquant_local.cache import TurboQuantCache
from turboquant_local.engine.decode_fusion import fused

_capturing: Final = Lock()
"""torch captures one graph at a time, whichever thread asks for it."""


@torch.no_grad()
def forward(
    model: Any, cache: TurboQuantCache, ids: torch.Tensor, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Run tokens into a cache; returns float32 scores `[1, vocab_size]` of the token behind them.

    Args:
        model: The model.
        cache: Its cache.
        ids: `[1, length]`.
        position_ids: `[1, length]`; counted from the cache's tokens if None.
    """
    known = inspect.signature(model.forward).parameters
    # Logits of a whole prompt can be larger than the model; nobody reads them.
    fewer: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    if position_ids is not None:
        fewer["position_ids"] = position_ids
    scores: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **fewer).logits[:, -1]
    return scores.float()


class DecodeStep:
    """Runs a model on one token after the other, over a cache in its static form.

    Args:
        model: The model.
        capture: Capture the step at its first use; where that fails, it runs as it is, and `obstacle` says why.
    """

    def __init__(self, model: Any, capture: bool) -> None:
        self.model = model
        self.obstacle = ""
        self._capture = capture
        self._ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._position = torch.zeros_like(self._ids)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._scores: torch.Tensor | None = None
        self._calls: Counter[str] = Counter()

    @property
    def how(self) -> str:
        """How it runs: "cuda graph", "static" where no capture was asked for, or "eager: " and why it failed."""
        return "cuda graph" if self._graph is not None else f"eager: {self.obstacle}" if self.obstacle else "static"

    def __call__(self, cache: TurboQuantCache, token: torch.Tensor, position: int) -> torch.Tensor:
        """Scores `[1, vocab_size]` of the next token, valid until the next call.

        Args:
            cache: In its static form, with room made for the token.
            token: `[1]`.
            position: Where it stands.
        """
        self._ids.copy_(token.unsqueeze(0))
        self._position.fill_(position)
        if self._capture and self._graph is None and not self.obstacle:
            self._record(cache)
        if self._graph is None or self._scores is None:
            return forward(self.model, cache, self._ids, self._position)
        self._graph.replay()
        cache.stats.attention.update(self._calls)
        return self._scores

    def _record(self, cache: TurboQuantCache) -> None:
        """Run the step to have everything compiled and allocated, then capture it. Both write the same place."""
        before = Counter(cache.stats.attention)
        stream = torch.cuda.current_stream()
        try:
            with fused(self.model):
                self._graph, self._scores = self._captured(cache, stream)
            self._calls = Counter({name: count // 2 for name, count in (cache.stats.attention - before).items()})
        except Exception as error:  # CUDA, torch, Triton and the model each have their own for what cannot be captured
            torch.cuda.set_stream(stream)
            _mend_random_state()
            self.obstacle = f"its step cannot be captured ({str(error).splitlines()[0]})"
        cache.stats.attention.clear()
        cache.stats.attention.update(before)

    def _captured(self, cache: TurboQuantCache, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        beside, captured = _streams(torch.cuda.current_device())
        beside.wait_stream(stream)
        with torch.cuda.stream(beside):
            forward(self.model, cache, self._ids, self._position)
        stream.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device.
        with _capturing, torch.cuda.graph(graph, stream=captured, capture_error_mode="thread_local"):
            scores = forward(self.model, cache, self._ids, self._position)
        return graph, scores


def _mend_random_state() -> None:
    """A capture that fails leaves torch's random numbers as if it were still going on; one that succeeds ends that."""
    _, captured = _streams(torch.cuda.current_device())
    with _capturing, torch.cuda.graph(torch.cuda.CUDAGraph(), stream=captured, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")


@lru_cache(maxsize=16)
def _streams(device: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Streams of a device to run a step in before it is captured, and to capture it in.

    Always the same, as cuBLAS keeps memory for each stream that it sees. torch's own for captures is on the device of
    the first capture of all.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)

"""For every test: nothing is sent or fetched, one thread computes, and Triton's kernels run without a GPU too.

A gate lets a model run step by step, wherever the engine is used.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

# Before torch is imported. More threads gain nothing on models this small, and when something else needs a core they
# wait for each other: on two busy cores, tests were seen to take 30 times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if TYPE_CHECKING:
    from turboquant_local.engine import ChatEngine

if not torch.cuda.is_available():  # must be said before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")


class Gate:
    """Lets a model's forward passes through one by one, and counts them."""

    def __init__(self, permits: int) -> None:
        self.steps = 0
        self._permits = threading.Semaphore(permits)

    def open(self, permits: int = 100_000) -> None:
        """Let so many more steps through."""
        self._permits.release(permits)

    def __call__(self, module: torch.nn.Module, args: object) -> None:
        """The hook: wait for a permit."""
        assert self._permits.acquire(timeout=60), "the test did not open the gate"
        self.steps += 1


@pytest.fixture
def gate() -> Iterator[Callable[..., Gate]]:
    """Puts a gate before the forward pass of an engine's model."""
    hooks = []

    def put(engine: ChatEngine, permits: int = 100_000) -> Gate:
        engine.load()
        assert engine._loaded is not None
        made = Gate(permits)
        hooks.append(engine._loaded.model.register_forward_pre_hook(made))
        return made

    yield put
    for hook in hooks:
        hook.remove()

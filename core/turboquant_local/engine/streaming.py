"""Events of a generation that runs in a thread of its own, for callers with and without an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator

from turboquant_local.engine.types import (
    ChatReply,
    Finished,
    ReasoningDelta,
    StreamEvent,
    TextDelta,
    ToolCallDelta,
)

Work = Callable[["Cancellation", Callable[[TextDelta | ReasoningDelta | ToolCallDelta], None]], ChatReply]
"""A generation: takes what may cancel it and where its events go, and returns the reply."""


class Cancellation:
    """Set when nobody wants the reply any more: by the caller's event or by ourselves.

    Args:
        event: The caller's event; None if there is none.
    """

    def __init__(self, event: threading.Event | None = None) -> None:
        self._caller = event
        self._own = threading.Event()

    def set(self) -> None:
        """Cancel."""
        self._own.set()

    def is_set(self) -> bool:
        """Whether it was cancelled."""
        return self._own.is_set() or (self._caller is not None and self._caller.is_set())


def stream_events(work: Work, cancel: threading.Event | None) -> Generator[StreamEvent, None, None]:
    """Run `work` in a thread and yield its events as they come; closing the iterator cancels it and waits for it.

    Raises:
        Exception: What `work` raises.
    """
    events: queue.SimpleQueue[StreamEvent | BaseException] = queue.SimpleQueue()
    cancellation = Cancellation(cancel)
    thread = threading.Thread(
        target=_produce, args=(work, cancellation, events.put), name="turboquant-generation", daemon=True
    )
    thread.start()
    try:
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Finished):
                return
    finally:
        cancellation.set()
        thread.join()


async def astream_events(work: Work, cancel: threading.Event | None) -> AsyncGenerator[StreamEvent, None]:
    """The same for an event loop, which is never blocked.

    Raises:
        Exception: What `work` raises.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[StreamEvent | BaseException] = asyncio.Queue()
    ended = asyncio.Event()
    cancellation = Cancellation(cancel)

    def call_in_loop(callback: Callable[..., None], *args: object) -> None:
        # A loop that is closed has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(callback, *args)

    def produce() -> None:
        try:
            _produce(work, cancellation, lambda event: call_in_loop(events.put_nowait, event))
        finally:
            call_in_loop(ended.set)

    threading.Thread(target=produce, name="turboquant-generation", daemon=True).start()
    try:
        while True:
            event = await events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Finished):
                return
    finally:
        cancellation.set()
        await ended.wait()


def _produce(work: Work, cancellation: Cancellation, deliver: Callable[[StreamEvent | BaseException], None]) -> None:
    try:
        deliver(Finished(work(cancellation, deliver)))
    except BaseException as error:
        deliver(error)

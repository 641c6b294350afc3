"""Events of a generation that runs in a thread of its own, for callers with and without an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator

from turboquant_local.engine.types import ChatReply, Delta, Finished, StreamEvent

Emit = Callable[[Delta], None]
Work = Callable[["Cancellation", Emit], ChatReply]
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
    ended = _run(lambda: _produce(work, cancellation, events.put))
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
        # The garbage collector closes a forgotten iterator in any thread: a generation would wait for itself.
        if not isinstance(threading.current_thread(), _Worker):
            ended.wait()


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

    _run(produce)
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


_idle: list[_Worker] = []
"""Threads without work; the youngest is taken first."""


class _Worker(threading.Thread):
    """Runs one generation after the other.

    cuDNN keeps its plans by thread; making those of a prompt anew would delay its first token.
    """

    def __init__(self) -> None:
        super().__init__(name="turboquant-idle", daemon=True)
        self.jobs: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            job, ended = self.jobs.get()
            try:
                self.name = "turboquant-generation"
                contextvars.Context().run(job)  # nothing is left of the job before
                del job
                self.name = "turboquant-idle"
                _idle.append(self)
            finally:
                ended.set()
            del ended


def _run(job: Callable[[], None]) -> threading.Event:
    """Run something in a thread of its own; what is returned is set once it has ended."""
    ended = threading.Event()
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
        worker.start()
    worker.jobs.put((job, ended))
    return ended


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_idle.clear)  # a child has none of its parent's threads

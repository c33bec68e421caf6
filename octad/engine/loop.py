"""EngineLoop: one thread that owns an engine; everybody else has an inbox and a stream.

    loop = EngineLoop(engine)
    for delta in loop.submit(prompt, params): ...            # blocking, or: async for delta in loop.submit(...)
    output = loop.submit(prompt, params, deltas=False).output()
    loop.call(engine.reset_prefix_cache)                      # between two steps

Chats, tasks, the Python API and the server all come through here and may do so at the same time, from any thread or from
asyncio: nobody else calls `engine.step`, so that nobody's deltas get lost. What takes long without the model (checking a
request, compiling its form) is done in the caller's thread. A request that is closed is gone after the step that runs.

The thread begins with the first request and ends when nothing is left to do, so that an idle engine can be let go of.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

if TYPE_CHECKING:
    from octad.engine.engine import Engine
    from octad.engine.outputs import Delta, RequestOutput
    from octad.engine.params import SamplingParams

Result = TypeVar("Result")
Submission = tuple[Sequence[int], "SamplingParams", str | None]  # prompt, params, the prompt's text


class EngineLoop:
    """Owns `engine` while anything runs. Any thread may call any method."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: deque[Callable[[], None]] = deque()
        self._streams: dict[str, Stream] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ids = count(1)
        self._bells: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bell] = weakref.WeakKeyDictionary()
        self._exit = _Exit()
        weakref.finalize(self, self._exit.leave)  # also when the interpreter ends

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        text: str | None = None,
        *,
        deltas: bool = True,
    ) -> Stream:
        """Queue one prompt. Raises RequestError as Engine.prepare does. Without `deltas` only the output is kept."""
        return self.submit_all([(prompt, params, text)], deltas=deltas)[0]

    def submit_all(self, batch: Sequence[Submission], *, deltas: bool = True) -> list[Stream]:
        """Queue several prompts, or none of them where one is refused."""
        made = [
            self.engine.prepare(f"request-{next(self._ids)}", prompt, params, text)
            for prompt, params, text in batch
        ]
        streams = [Stream(self, one.request.request_id, one.request.params.n, deltas) for one in made]

        def enqueue() -> None:
            for prepared, stream in zip(made, streams, strict=True):
                self._streams[stream.request_id] = stream
                self.engine.enqueue(prepared, stream.hear)

        if streams:
            self.post(enqueue)
        return streams

    def call(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the engine's thread between two steps, and wait for what it returns or raises."""
        if threading.current_thread() is self._thread:
            return work()
        done, found = threading.Event(), list[tuple[Any, BaseException | None]]()

        def carry_out() -> None:
            try:
                found.append((work(), None))
            except BaseException as error:
                found.append((None, error))
            finally:
                done.set()

        self.post(carry_out)
        done.wait()
        result, error = found[0]
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def post(self, work: Callable[[], None]) -> None:
        """Have `work` done on the engine's thread between two steps; does not wait."""
        with self._lock:
            self._inbox.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="octad engine", daemon=True)
                self._exit.thread = self._thread
                self._thread.start()

    def bell(self, loop: asyncio.AbstractEventLoop) -> Bell:
        """What wakes the readers that wait in this event loop."""
        return self._bells.get(loop) or self._bells.setdefault(loop, Bell(loop))

    @property
    def running(self) -> bool:
        """Whether the thread is there, which it is only while there is something to do."""
        return self._thread is not None

    def wait(self) -> None:
        """Until nothing is left to do."""
        if (thread := self._thread) is not None and thread is not threading.current_thread():
            thread.join()

    # ---- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps the number by thread
        while self._take_inbox() and not self._exit.asked:
            try:
                self.engine.step()
            except BaseException as error:  # whatever it is, those who wait must hear of it
                self._fail(error)

    def _take_inbox(self) -> bool:
        """Do what was posted; False, and the thread is given up, where nothing is left to do."""
        while True:
            with self._lock:
                work, self._inbox = self._inbox, deque()
                if not work:
                    if not self.engine.has_unfinished():
                        self._thread = None
                        return False
                    return True
            for one in work:
                one()

    def _fail(self, error: BaseException) -> None:
        """A step that failed ends every request; the engine can go on with others."""
        for stream in list(self._streams.values()):
            self.forget(stream.request_id)
            stream.fail(error)
        for request_id in list(self.engine.requests):
            self.engine.abort(request_id)

    def forget(self, request_id: str) -> None:
        """On the engine's thread: stop a request, if it still runs."""
        self._streams.pop(request_id, None)
        self.engine.abort(request_id)

    def ended(self, request_id: str) -> RequestOutput:
        """On the engine's thread: all of a request that has just finished."""
        self._streams.pop(request_id, None)
        return self.engine.output(request_id)


class Bell:
    """Wakes readers in one event loop, all of a step at once: calling into another thread's loop is a system call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._waiting: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def ring(self, wake: Callable[[], None]) -> None:
        """From any thread: `wake` is called in the loop. Raises RuntimeError for one that is closed."""
        with self._lock:
            self._waiting.append(wake)
            first = len(self._waiting) == 1
        if first and (loop := self._loop()) is not None:
            loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()


class _Exit:
    """How a loop's thread ends with the interpreter: after the step that runs. One that is cut off inside a kernel would
    take the process down with it."""

    def __init__(self) -> None:
        self.asked = False
        self.thread: threading.Thread | None = None

    def leave(self) -> None:
        """Ask, and wait."""
        self.asked = True
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()


class Stream(Iterator["Delta"], AsyncIterator["Delta"]):
    """What one request gets, as it comes: iterate over it, blocking or async (one of both, one reader). It ends when each
    of the answers has its finish_reason; closing it earlier aborts the request."""

    def __init__(self, loop: EngineLoop, request_id: str, answers: int, keep: bool) -> None:
        self.request_id, self._loop, self._open, self._keep = request_id, loop, answers, keep
        self._items: deque[Delta] = deque()
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None
        self._over = False
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], None]] = []

    # ---- the engine's side ---------------------------------------------------------------------------------

    def hear(self, delta: Delta) -> None:
        """One more delta; with the last one the output is there, too."""
        self._open -= delta.finish_reason is not None
        output = self._loop.ended(self.request_id) if not self._open else None
        with self._lock:
            if self._keep:
                self._items.append(delta)
            self._output = output
            self._over = output is not None
        if self._keep or output is not None:
            self._wake()

    def fail(self, error: BaseException) -> None:
        """Nothing more will come; readers get the error."""
        with self._lock:
            self._error, self._over = error, True
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            with suppress(RuntimeError):  # an asyncio loop that is closed by now
                wake()

    # ---- the reader's side ---------------------------------------------------------------------------------

    def _ready(self, waker: Callable[[], None]) -> bool:
        """Whether there is something to read, or nothing more to wait for; else `waker` is called when that changes."""
        with self._lock:
            if self._items or self._over:
                return True
            self._wakers.append(waker)
            return False

    def _next(self) -> Delta | None:
        """The next delta, None at the end. Raises what the engine's step raised."""
        if self._items:
            return self._items.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _wait(self, until: Callable[[Callable[[], None]], bool]) -> None:
        woken = threading.Event()
        while not until(woken.set):
            woken.wait()
            woken.clear()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        self._wait(self._ready)
        if (delta := self._next()) is None:
            raise StopIteration
        return delta

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        await self._waited(self._ready)
        if (delta := self._next()) is None:
            raise StopAsyncIteration
        return delta

    async def _waited(self, until: Callable[[Callable[[], None]], bool]) -> None:
        bell, woken = self._loop.bell(asyncio.get_running_loop()), asyncio.Event()

        def wake() -> None:
            bell.ring(woken.set)

        while not until(wake):
            await woken.wait()
            woken.clear()

    def _ended(self, waker: Callable[[], None]) -> bool:
        with self._lock:
            if not self._over:
                self._wakers.append(waker)
            return self._over

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended, after so long at most."""
        woken = threading.Event()
        if not self._over and seconds and not self._ended(woken.set):
            woken.wait(seconds)
        return self._over

    def output(self) -> RequestOutput:
        """Everything, once it is finished; blocks until then. Raises what the engine's step raised."""
        self._wait(self._ended)
        return self._result()

    async def result(self) -> RequestOutput:
        """`output` for asyncio."""
        await self._waited(self._ended)
        return self._result()

    def _result(self) -> RequestOutput:
        if self._error is not None:
            raise self._error
        assert self._output is not None, "the request was closed"
        return self._output

    def pending(self) -> list[Delta]:
        """What is there to be read right now, taken."""
        with self._lock:
            found = list(self._items)
            self._items.clear()
        return found

    def close(self) -> None:
        """Abort the request if it has not finished: nothing more is to be read, its blocks are free when this returns."""
        if not self._over and not sys.is_finalizing():
            self._loop.call(self._abort)

    def close_soon(self) -> None:
        """Abort without waiting: it is done before the next step."""
        if not self._over:
            self._loop.post(self._abort)

    def _abort(self) -> None:
        self._loop.forget(self.request_id)
        with self._lock:
            self._items.clear()
            self._over = True
        self._wake()

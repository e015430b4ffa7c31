"""The thread that owns the engine. The event loop hands it work and gets updates back; neither waits on the other.

What crosses: closures to the thread through a queue, and to the loop one callback a step with all that came of it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from teacher.requests import Request, Update
from teacher.server.errors import ApiError, engine_failed, shutting_down
from teacher.server.metrics import Metrics, RequestClock

if TYPE_CHECKING:
    from teacher.engine import EngineStats

log = logging.getLogger("distill.server")
Result = TypeVar("Result")


class EngineLike(Protocol):
    """What the worker needs of `teacher.engine.Engine`."""

    def check(self, request: Request) -> None: ...
    def add(self, request: Request) -> None: ...
    def cancel(self, id: str) -> bool: ...
    def step(self) -> list[Update]: ...
    @property
    def has_work(self) -> bool: ...
    def stats(self) -> EngineStats: ...


class Batch:
    """Requests that were submitted together; lives on the event loop. Iterating gives what has come since the last
    time, so a slow reader gets fewer, larger pieces. Raises ApiError if the engine refuses them or fails."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.index = {request.id: n for n, request in enumerate(requests)}
        self.unfinished = set(self.index)
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._updates: list[Update] = []
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[list[Update]]:
        while True:
            await self._news.wait()
            self._news.clear()
            updates, self._updates = self._updates, []
            if updates:
                yield updates
            if self._error is not None:
                raise self._error
            if not self.unfinished and not self._updates:
                return

    def put(self, update: Update) -> None:
        self._updates.append(update)
        if update.completion is not None:
            self.unfinished.discard(update.id)
        self._news.set()

    def fail(self, error: ApiError) -> None:
        self._error = error
        if not self.accepted.done():
            self.accepted.set_exception(error)
            self.accepted.exception()  # whoever awaits it gets it; nobody must
        self._news.set()


class Worker:
    """`submit`, `cancel` and `call` are for the event loop on which `start` was called; `most` bounds the requests
    that are waiting or running."""

    def __init__(self, engine: EngineLike, metrics: Metrics, most: int) -> None:
        self.most = most
        self.error: BaseException | None = None  # what ended the engine
        self.draining = False
        self._engine, self._metrics = engine, metrics
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._calls: deque[Callable[[], None]] = deque()  # the thread's: one of them between two steps
        self._clocks: dict[str, RequestClock] = {}  # the thread's
        self._live: dict[str, Batch] = {}  # the loop's
        self._futures: set[asyncio.Future[Any]] = set()  # the loop's
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._metrics.stats = self._engine.stats()
        self._thread.start()

    async def stop(self) -> None:
        """End what is left, and the thread after the step it is in."""
        self.fail_all(shutting_down())
        self._commands.put(self._halt)
        await asyncio.to_thread(self._thread.join, 30)

    def check_room(self, count: int) -> None:
        """Raise ApiError where `count` more requests are too many, now (429) or at any time (400)."""
        if self.error is not None:
            raise engine_failed(503)
        if self.draining:
            raise shutting_down()
        if count > self.most:
            raise ApiError(400, f"{count} sequences in one call; this server takes {self.most} at most", "n")
        if len(self._live) + count > self.most:
            wait = min(60, max(1, round(self._metrics.seconds)))
            raise ApiError(429, f"{len(self._live)} requests are waiting or running; try again", retry_after=wait)

    async def submit(self, requests: Sequence[Request]) -> Batch:
        """Queue all of them, or none: raises ApiError if there is no room or the engine refuses one."""
        self.check_room(len(requests))
        batch = Batch(requests)
        self._live.update((request.id, batch) for request in requests)
        clocks = [RequestClock(request.stream) for request in requests]
        self._commands.put(lambda: self._add(batch, clocks))
        try:
            await batch.accepted
        except BaseException:
            self.cancel(batch)
            raise
        return batch

    def cancel(self, batch: Batch) -> None:
        """End what of the batch is not finished, at the engine's next step."""
        ids = [id for id in batch.unfinished if id in self._live]
        if ids and self.error is None:
            self._commands.put(lambda: self._cancel(ids))

    async def call(self, function: Callable[[], Result]) -> Result:
        """The result of `function`, run on the engine's thread between two steps."""
        if self.error is not None:
            raise engine_failed(503)
        future: asyncio.Future[Result] = self._loop.create_future()
        self._futures.add(future)

        def settle(result: Result | None, error: BaseException | None) -> None:
            self._futures.discard(future)
            if future.done():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def run() -> None:
            if future.cancelled():  # only read here: the client has gone, the work is not worth doing
                return
            try:
                result = function()
            except Exception as error:
                self._post(settle, None, error)
            else:
                self._post(settle, result, None)

        self._commands.put(lambda: self._calls.append(run))
        try:
            return await future
        finally:
            self._futures.discard(future)

    def fail_all(self, error: ApiError) -> None:
        """End every call in flight with `error`."""
        batches = set(self._live.values())
        for batch in batches:
            self.cancel(batch)
            batch.fail(error)
        self._live.clear()
        for future in list(self._futures):
            if not future.done():
                future.set_exception(error)

    # From here to the end of the class, all runs on the engine's thread, but for the two that are posted.

    def _run(self) -> None:
        try:
            while not self._stop:
                self._take_commands()
                if self._calls:
                    self._calls.popleft()()
                if self._engine.has_work and not self._stop:
                    self._deliver(self._engine.step())
        except BaseException as error:
            self.error = error
            log.critical("the engine has failed", exc_info=error)
            self._post(self.fail_all, engine_failed())

    def _take_commands(self) -> None:
        """Run all that wait; wait for one if there is nothing else to do."""
        idle = not self._engine.has_work and not self._calls
        try:
            while True:
                self._commands.get(block=idle)()
                idle = False
        except queue.Empty:
            pass

    def _halt(self) -> None:
        self._stop = True

    def _add(self, batch: Batch, clocks: list[RequestClock]) -> None:
        try:
            for request in batch.requests:
                self._engine.check(request)
        except ValueError as error:
            reason = str(error).partition("cannot be served: ")[2] or str(error)
            self._post(self._refuse, batch, ApiError(400, reason))
            return
        for request, clock in zip(batch.requests, clocks, strict=True):
            self._clocks[request.id] = clock
            self._engine.add(request)
        self._post(self._accept, batch)

    def _cancel(self, ids: list[str]) -> None:
        for id in ids:
            self._engine.cancel(id)

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            self._metrics.observe(self._clocks[update.id], update)
            if update.completion is not None:
                del self._clocks[update.id]
        self._metrics.stats = self._engine.stats()
        if updates:
            self._post(self._spread, updates)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            self._stop = True

    # Posted to the event loop:

    def _accept(self, batch: Batch) -> None:
        if not batch.accepted.done():
            batch.accepted.set_result(None)

    def _refuse(self, batch: Batch, error: ApiError) -> None:
        for request in batch.requests:
            self._live.pop(request.id, None)
        batch.fail(error)

    def _spread(self, updates: list[Update]) -> None:
        for update in updates:
            batch = self._live.get(update.id)
            if batch is None:
                continue
            if update.completion is not None:
                del self._live[update.id]
            batch.put(update)

"""Batches over processes, results in the batches' order, few of them in flight.

Not multiprocessing's pools: forking is unsafe where threads, a model and a GPU may live, and spawning runs the
caller's script again, which a user's own script need not expect. A worker here is a fresh interpreter that imports the
one module asked for and ends when the parent's end of the pipe closes, however the parent ended.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

T = TypeVar("T")
_AHEAD = 2  # batches a worker has at once, so that it never waits for the parent


class Workers:
    """A context manager with `count` processes, started when first needed; with 1 the work is done in this one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._started: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def map(
        self, function: Callable[[Any, Sequence[Any]], T], task: Any, batches: Iterable[Sequence[Any]]
    ) -> Iterator[T]:
        """function(task, batch) for each batch; `function` is a module's, arguments and results can be pickled.

        Raises what `function` raised; RuntimeError if a worker died (of too little memory, say).
        """
        if self.count <= 1:
            for batch in batches:
                yield function(task, batch)
            return
        self._start()
        for _, pipe in self._started:
            pipe.send((function.__module__, function.__qualname__, task))
        sent = received = 0
        for batch in batches:
            if sent - received == _AHEAD * self.count:
                yield self._receive(received)
                received += 1
            with suppress(BrokenPipeError):  # said when its answer is missing
                self._started[sent % self.count][1].send(batch)
            sent += 1
        while received < sent:
            yield self._receive(received)
            received += 1

    def _receive(self, number: int) -> Any:
        process, pipe = self._started[number % self.count]
        try:
            done, result = pipe.recv()
        except (EOFError, ConnectionResetError):
            code = process.wait()
            raise RuntimeError(f"a worker process died (exit code {code}); was there too little memory?") from None
        if not done:
            raise result
        return result

    def _start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        while len(self._started) < self.count:
            ours, theirs = Pipe()
            process = subprocess.Popen(
                [sys.executable, "-c", f"from distill.workers import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
            theirs.close()
            self._started.append((process, ours))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for process, pipe in self._started:
            pipe.close()
            if error[0] is not None:
                process.kill()  # what it is doing is of no more use
        for process, _ in self._started:
            process.wait()
        self._started.clear()


def serve(handle: int) -> None:
    """A worker's whole life: a task, then its batches, then maybe another task."""
    pipe: Connection[Any, Any] = Connection(handle)
    function: Callable[[Any, Sequence[Any]], Any] | None = None
    task: Any = None
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return
        if isinstance(message, tuple):
            module, name, task = message
            function = getattr(importlib.import_module(module), name)
            continue
        assert function is not None
        try:
            answer = (True, function(task, message))
        except Exception as error:  # it is the caller's, who raises it
            answer = (False, error)
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


def usable_cores() -> int:
    # macOS does not say which cores a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Killable worker processes for computer algebra and scorers on hostile input.

Why not math-verify's own time-out: it is a signal handler, so it works in the main thread only and does not interrupt
one long C-level operation (9**9**9**9). Here the clock is the caller's, the worker is killed, and a fresh one takes
its place; one worker holds one item, so no other item is lost. Workers are forked from a template that has imported
everything and never sees an item: a new one is there in milliseconds. The template is started by exec, never by fork,
because the caller may be a process with threads, a model and a GPU context.
"""

import atexit
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

MEMORY_BYTES = 1 << 30
START_SECONDS = 60.0  # importing sympy on a busy machine; an item's own clock starts after it
REPLY_BYTES = 65536
# Of a limit, a fifth at most: for noticing and killing, so that the caller is answered within it. Another thread that
# searches a megabyte holds the interpreter for tens of milliseconds, in which nobody can notice anything.
KILL_SECONDS = 0.05
TRIES = 3  # of an item whose worker dies
_INSTALL = {"math": "math_verify", "gym": "reasoning_gym"}


def _line(stream: socket.socket, seconds: float) -> bytes | None:
    """One line, b'' if the other side ended, None if the time is over."""
    deadline, data = time.monotonic() + seconds, b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            return None
        try:
            part = stream.recv(REPLY_BYTES)
        except ConnectionResetError:
            return b""
        if not part or len(data) > REPLY_BYTES:
            return b""
        data += part
    return data


class _Template:
    """The process that workers are forked from."""

    def __init__(self, preload: str) -> None:
        self.preload = preload
        self._control, theirs = socket.socketpair()
        script = str(Path(__file__).with_name("worker.py"))
        environment = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-B", script, preload, str(MEMORY_BYTES), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C in the caller's terminal is the caller's to handle
        )
        theirs.close()
        self._lock = threading.Lock()
        self._ready = False

    def wait_until_ready(self) -> None:
        """Until it has imported everything, which is on no item's clock. RuntimeError if it does not start."""
        with self._lock:
            if self._ready:
                return
            if _line(self._control, START_SECONDS) != b"ready\n":
                self.close()
                raise RuntimeError(
                    f"the grading process did not start: run `{sys.executable} -c 'import "
                    f"{_INSTALL[self.preload]}'` to see whether that package is installed"
                )
            self._ready = True

    def fork(self) -> "_Worker":
        """A new worker. RuntimeError if the template does not start, BrokenPipeError if it has died."""
        self.wait_until_ready()
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            try:
                socket.send_fds(self._control, [b"f\n"], [theirs.fileno()])
                reply = _line(self._control, START_SECONDS)
            except OSError:
                reply = b""
        if not reply:
            ours.close()
            raise BrokenPipeError("the grading process has died")
        return _Worker(self, int(reply), ours)

    def kill(self, pid: int) -> None:
        """Have a worker killed, without waiting for its end: to free a gigabyte takes the kernel a while."""
        # Where the template has died, its workers see their sockets close.
        with self._lock, suppress(OSError):
            self._control.sendall(b"k%d\n" % pid)

    def close(self) -> None:
        """End it; it kills its workers first, unless it hangs itself."""
        self._control.close()
        try:
            self.process.wait(5.0 if self._ready else 0.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Worker:
    """One child process; `ask` is called by one thread at a time."""

    def __init__(self, template: _Template, pid: int, stream: socket.socket) -> None:
        self.template, self.pid, self._stream = template, pid, stream

    def alive(self) -> bool:
        """Whether it may take an item: it says nothing unasked, so a readable socket means that it ended."""
        return not select.select([self._stream], [], [], 0)[0]

    def ask(self, request: dict[str, object], seconds: float) -> tuple[str, str] | None:
        """(verdict, reason), or None after which the worker is of no more use and must be closed."""
        self._stream.settimeout(seconds)
        try:
            self._stream.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            return None
        line = _line(self._stream, seconds)
        if not line:
            return None
        verdict, reason = json.loads(line)
        return verdict, reason

    def close(self) -> None:
        """Kill; the template reaps it."""
        self._stream.close()
        self.template.kill(self.pid)


class Pool:
    """At most `size` workers, started when needed and shared by all threads of a process.

    preload: 'math' or 'gym'. once: a worker serves one item only, for scorers that an answer could tamper with.
    """

    def __init__(self, size: int, preload: str = "math", once: bool = False) -> None:
        self.size, self.preload, self.once = size, preload, once
        self._free: list[_Worker] = []
        self._template: _Template | None = None
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(size)

    def compare(self, answer: str, reference: str, seconds: float) -> tuple[str, str]:
        """math-verify's (verdict, reason); 'unverifiable' if that took longer than `seconds` or too much memory."""
        return self.ask("math", answer, reference, seconds)

    def ask(self, task: str, answer: str, reference: str, seconds: float) -> tuple[str, str]:
        """(verdict, reason) of a task of worker.py within `seconds`, from when a slot is free and the imports are done.

        A worker's start and end are in that time, and so is a second worker where the first one died.
        """
        request: dict[str, object] = {"task": task, "answer": answer, "reference": reference, "seconds": seconds}
        with self._slots:
            self._ready_template()
            deadline = time.monotonic() + seconds - min(KILL_SECONDS, seconds / 5)
            for attempt in range(TRIES):
                worker = self._take(fresh=attempt > 0)
                try:
                    result = worker.ask(request, max(0.0, deadline - time.monotonic()))
                except BaseException:
                    worker.close()
                    raise
                if result is not None:
                    if self.once:
                        worker.close()
                    else:
                        with self._lock:
                            self._free.append(worker)
                    return result
                worker.close()
                if time.monotonic() >= deadline:
                    return "unverifiable", f"took longer than {round(seconds, 2):g} s to compare"
                # It may have been killed from outside, which is no fault of the item: again, in a fresh one.
            return "unverifiable", "the comparison needed too much memory or crashed"

    def _ready_template(self) -> _Template:
        with self._lock:
            if self._template is None:
                self._template = _Template(self.preload)
            template = self._template
        template.wait_until_ready()
        return template

    def _take(self, fresh: bool) -> _Worker:
        """An idle worker, or a new one. One that died idle (the system was short of memory) is no item's fault."""
        with self._lock:
            while self._free and not fresh:
                worker = self._free.pop()
                if worker.alive():
                    return worker
                worker.close()
        template = self._ready_template()
        try:
            return template.fork()
        except BrokenPipeError:
            with self._lock:
                if self._template is template:
                    template.close()
                    self._template = None
            return self._ready_template().fork()

    def close(self) -> None:
        """Kill the idle workers and the template; used at exit and in tests."""
        with self._lock:
            workers, self._free = self._free, []
            ended, self._template = self._template, None
        for worker in workers:
            worker.close()
        if ended is not None:
            ended.close()


_pools: dict[str, Pool] = {}
_pools_owner = -1
_pools_lock = threading.Lock()


def cores() -> int:
    """Processors that this process may use; macOS does not say which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_pool(preload: str = "math") -> Pool:
    """The pool of this process, made at first use; a forked child gets one of its own."""
    global _pools_owner
    with _pools_lock:
        if _pools_owner != os.getpid():
            _pools.clear()
            _pools_owner = os.getpid()
        if preload not in _pools:
            _pools[preload] = Pool(max(2, min(16, cores())), preload, once=preload == "gym")
            atexit.register(_pools[preload].close)
        return _pools[preload]

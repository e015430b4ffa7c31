"""Killable worker processes for computer algebra on hostile input.

Why not math-verify's own time-out: it is a signal handler, so it works in the main thread only and does not interrupt
one long C-level operation (9**9**9**9). Here the clock is the caller's, the child is killed, and a fresh one takes
its place; one child holds one item, so no other item is lost. Children are started by exec, never by fork, because
the caller may be a process with threads, a model and a GPU context.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

MEMORY_BYTES = 1 << 30
START_SECONDS = 60.0  # importing sympy on a busy machine; an item's own clock starts after it


class _Worker:
    """One child process; `ask` is called by one thread at a time."""

    def __init__(self) -> None:
        environment = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in the caller's terminal is the caller's to handle
        )
        self.ready = False

    def _line(self, seconds: float) -> bytes | None:
        """One line from the child, b'' if it died, None if the time is over."""
        assert self.process.stdout is not None
        deadline, data = time.monotonic() + seconds, b""
        while not data.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            part = os.read(self.process.stdout.fileno(), 65536)
            if not part:
                return b""
            data += part
        return data

    def ask(self, answer: str, reference: str, seconds: float) -> tuple[str, str] | None:
        """(verdict, reason), or None after which the worker is of no more use and must be closed."""
        assert self.process.stdin is not None
        if not self.ready:
            if self._line(START_SECONDS) != b"ready\n":
                raise RuntimeError(
                    "the grading process did not start: run "
                    f"`{sys.executable} -c 'import math_verify'` to see whether math-verify is installed"
                )
            self.ready = True
        request = {"answer": answer, "reference": reference, "seconds": seconds}
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            return None
        line = self._line(seconds)
        if not line:
            return None
        verdict, reason = json.loads(line)
        return verdict, reason

    def close(self) -> None:
        """Kill and reap."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Pool:
    """At most `size` workers, started when needed and shared by all threads of a process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[_Worker] = []
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(size)

    def compare(self, answer: str, reference: str, seconds: float) -> tuple[str, str]:
        """math-verify's (verdict, reason); 'unverifiable' if that took longer than `seconds` or too much memory."""
        with self._slots:
            worker = self._take()
            started = time.monotonic()
            try:
                result = worker.ask(answer, reference, seconds)
            except BaseException:
                worker.close()
                raise
            if result is None:
                took = time.monotonic() - started
                worker.close()
                worker = _Worker()  # starts importing now, while the caller goes on
                if took >= seconds:
                    result = "unverifiable", f"took longer than {seconds:g} s to compare"
                else:
                    result = "unverifiable", "the comparison needed too much memory or crashed"
            with self._lock:
                self._free.append(worker)
            return result

    def _take(self) -> _Worker:
        """An idle worker, or a new one. One that died idle (the system was short of memory) is no item's fault."""
        with self._lock:
            while self._free:
                worker = self._free.pop()
                if worker.process.poll() is None:
                    return worker
                worker.close()
        return _Worker()

    def close(self) -> None:
        """Kill the idle workers; used at exit and in tests."""
        with self._lock:
            workers, self._free = self._free, []
        for worker in workers:
            worker.close()


_pool: Pool | None = None
_pool_owner = -1
_pool_lock = threading.Lock()


def shared_pool() -> Pool:
    """The pool of this process, made at first use; a forked child gets one of its own."""
    global _pool, _pool_owner
    with _pool_lock:
        if _pool is None or _pool_owner != os.getpid():
            # macOS does not say which cores a process may use.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            _pool = Pool(max(2, min(16, cores)))
            _pool_owner = os.getpid()
            atexit.register(_pool.close)
        return _pool

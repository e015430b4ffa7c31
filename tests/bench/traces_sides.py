"""Running one side of tests/bench/traces.py: a child process, its time, its processors' time and its memory.

CPU seconds and memory are of the child and everything that it started, the server's apart; both are counted from the
moment that the child has imported what it needs. Memory is PSS, in which pages that processes share count once.
"""

import json
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.traces_server import InstantServer

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT = 120.0


class SideFailed(Exception):
    """The child ended, or was not done in time; says what it last said."""


@dataclass
class Timing:
    finished: int
    wall: float
    cpu: float  # of the child and all that it started
    server_cpu: float
    memory: int  # bytes, the most seen at once

    @property
    def rate(self) -> float:
        return self.finished / self.wall

    @property
    def per_cpu_second(self) -> float:
        return self.finished / self.cpu


def tree_cpu(process: psutil.Process) -> float:
    """Seconds of the process, its living children and those that it has waited for."""
    total = 0.0
    for part in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = part.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def tree_memory(process: psutil.Process) -> int:
    total = 0
    for part in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{part.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


class Child:
    """A child that speaks as traces_children says. A context manager, which ends everything that the child started."""

    def __init__(self, command: list[str]) -> None:
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the child
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.tree = psutil.Process(self.process.pid)

    def line(self, limit: float) -> str:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            found = selector.select(limit)
        said = self.process.stdout.readline().decode() if found else ""
        if not said:
            self.log.seek(0)
            lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
            why = "ended" if found else f"was not done after {limit:.0f} s"
            raise SideFailed(f"{why}; it last said: {lines[-1][:300] if lines else 'nothing'}")
        return said

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        # First by descent, for a child may have left the session; the ended leader's session is still its group.
        with suppress(psutil.NoSuchProcess):
            for part in [*self.tree.children(recursive=True), self.tree]:
                with suppress(psutil.NoSuchProcess):
                    part.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


class Watch:
    """The most memory that a tree of processes had at once, looked at four times a second."""

    def __init__(self, tree: psutil.Process) -> None:
        self.most = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(tree,), daemon=True)

    def _look(self, tree: psutil.Process) -> None:
        while not self._end.wait(0.25):
            with suppress(psutil.NoSuchProcess):
                self.most = max(self.most, tree_memory(tree))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def measure(command: list[str], server: InstantServer, limit: float) -> Timing:
    """Run a side once. Raises SideFailed."""
    with Child(command) as child, Watch(child.tree) as watch:
        child.line(START_LIMIT)
        server_before, before = server.cpu_seconds(), tree_cpu(child.tree)
        start = time.perf_counter()
        child.go()
        facts = json.loads(child.line(limit))
        wall = time.perf_counter() - start
        return Timing(
            facts["finished"], wall, tree_cpu(child.tree) - before, server.cpu_seconds() - server_before,
            max(watch.most, tree_memory(child.tree)),
        )  # fmt: skip

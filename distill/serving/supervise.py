"""A server kept alive: started, waited for, its log passed on, started again when it dies, ended with all its parts.

vLLM is several processes; one of them may die of a CUDA error, of memory or of an administrator, after hours of work.
Clients that retry (teacher.kind 'endpoint' does) then only wait.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO

_TICK = 0.2
_KEPT_LINES = 20
_MOST_BACK_OFF = 60.0
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Patience:
    """Seconds, but for `restarts`."""

    start: float = 7200.0  # until it first answers: 700 GB of weights take their time
    grace: float = 30.0  # from SIGTERM to SIGKILL
    restarts: int = 10  # in a row, before it is given up
    steady: float = 600.0  # of health, after which earlier deaths are forgotten
    silent: float = 300.0  # without an answer to /health, before a server that still runs counts as dead


class ServerLost(OSError):
    """The server did not come up, or died too often."""


class Supervisor:
    """Runs `command` until SIGTERM, SIGINT or SIGHUP; `url` is its root, where /health says 200 once it is ready."""

    def __init__(
        self, command: Sequence[str], url: str, patience: Patience, environment: Mapping[str, str] | None = None
    ) -> None:
        self.command, self.url, self.patience = list(command), url, patience
        self._environment = environment
        self._stopping = threading.Event()
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        self.restarts = 0  # over the whole life

    def run(self) -> None:
        """Returns once asked to stop; raises ServerLost where it cannot be kept alive."""
        before = {number: signal.signal(number, self._stop) for number in _STOP}
        try:
            self._keep_alive()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping.set()

    def _keep_alive(self) -> None:
        in_a_row = 0
        ever_healthy = False
        while not self._stopping.is_set():
            process = self._start()
            try:
                healthy = self._watch(process)
            finally:
                self._end(process)
            if self._stopping.is_set():
                return
            ever_healthy |= healthy > 0
            if not ever_healthy:
                # Wrong arguments, too little memory: again would be the same.
                raise ServerLost(f"the server ended before it was ready; it said last: {self._words()}")
            in_a_row = 1 if healthy >= self.patience.steady else in_a_row + 1
            if in_a_row > self.patience.restarts:
                raise ServerLost(f"the server died {in_a_row} times in a row; it said last: {self._words()}")
            wait = min(2.0 ** (in_a_row - 1), _MOST_BACK_OFF)
            self.restarts += 1
            _say(f"the server died ({_how(process.returncode)}); restart {self.restarts} in {wait:g} s")
            self._stopping.wait(wait)

    def _start(self) -> "subprocess.Popen[str]":
        self._last.clear()
        try:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=None if self._environment is None else dict(self._environment),
                start_new_session=True,  # Ctrl-C reaches us alone, and ending its group ends all its processes
            )
        except OSError as error:
            raise ServerLost(f"'{self.command[0]}' does not start: {error.strerror or error}") from None
        assert process.stdout
        threading.Thread(target=self._pass_on, args=(process.stdout,), daemon=True).start()
        return process

    def _watch(self, process: "subprocess.Popen[str]") -> float:
        """Until it dies, hangs or we stop; returns the seconds for which it was healthy."""
        begun = answered = time.monotonic()
        ready: float | None = None
        while process.poll() is None and not self._stopping.wait(_TICK if ready is None else 5 * _TICK):
            now = time.monotonic()
            if self._answers():
                answered = now
                if ready is None:
                    ready = now
                    _say(f"ready after {now - begun:.0f} s: {self.url}/v1")
            elif now - answered > (self.patience.start if ready is None else self.patience.silent):
                _say(f"no answer from {self.url}/health for {now - answered:.0f} s")
                break
        return 0.0 if ready is None else max(time.monotonic() - ready, 1e-9)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError, ValueError):
            return False

    def _end(self, process: "subprocess.Popen[str]") -> None:
        """SIGTERM, then after a grace SIGKILL, to all of its processes; also to those that outlived the first."""
        for number, seconds in ((signal.SIGTERM, self.patience.grace), (signal.SIGKILL, 10.0)):
            if process.poll() is None or number == signal.SIGKILL:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)

    def _pass_on(self, stream: IO[str]) -> None:
        for line in stream:
            self._last.append(line.strip())
            print(line, end="", file=sys.stderr, flush=True)

    def _words(self) -> str:
        time.sleep(_TICK)  # for what is still in the pipe
        errors = [line for line in self._last if "Error" in line or "error:" in line]
        return (errors or list(self._last) or ["nothing"])[-1]


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def _say(line: str) -> None:
    print(f"distill: {line}", file=sys.stderr, flush=True)

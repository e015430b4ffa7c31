"""The other end of distill/serving/worker.py: start it, write to it, read what comes, and be rid of it."""

import json
import os
import queue
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_WORKER = Path(__file__).with_name("worker.py")
_KEPT_LINES = 400
_ERROR = re.compile(r"\b\w*(?:Error|Exception): \S.*")
# What vLLM's front process says when the engine behind it has failed; the cause stands elsewhere.
_ECHOES = ("Engine core initialization failed", "EngineCore encountered an issue")


class EngineProcess:
    """A started worker. Its messages come from `receive`; once `ended`, none are left."""

    def __init__(self, python: str, arguments: Mapping[str, Any], worker: Path = _WORKER) -> None:
        self._log: deque[str] = deque(maxlen=_KEPT_LINES)
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._fatal: str | None = None
        self.ended = False
        # A group of its own: Ctrl-C drains here and must not reach it, and ending it ends vLLM's processes too.
        self._process = subprocess.Popen(
            # -P: the worker's folder must not shadow the modules that vLLM imports.
            [python, "-P", str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={"VLLM_NO_USAGE_STATS": "1", **os.environ},
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        for work in (
            lambda: self._read(self._process.stdout),
            lambda: self._log.extend(self._process.stderr),
            self._end_group,
        ):
            threading.Thread(target=work, daemon=True).start()
        self.send([dict(arguments)])

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, messages: Iterable[Mapping[str, Any]]) -> None:
        """Write them; to a worker that has died it does nothing, `receive` tells of that."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.writelines(json.dumps(message) + "\n" for message in messages)
            self._process.stdin.flush()

    def receive(self, seconds: float) -> list[dict[str, Any]]:
        """What has come, waiting up to `seconds` for the first."""
        come: list[dict[str, Any]] = []
        try:
            message = self._messages.get(timeout=seconds)
            while message is not None:
                come.append(message)
                message = self._messages.get_nowait()
            self.ended = True
        except queue.Empty:
            pass
        return come

    def last_words(self) -> str:
        """Why it died, as far as it said: its own word, or the last error in its log."""
        if self._fatal and not any(echo in self._fatal for echo in _ECHOES):
            return self._fatal
        lines = list(self._log)
        for line in reversed(lines):
            error = _ERROR.search(line)
            if error and not any(echo in line for echo in _ECHOES):
                return error.group()
        return self._fatal or (lines[-1].strip() if lines else f"nothing; exit code {self._process.poll()}")

    def kill(self) -> None:
        """End it and every process of its group, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                break  # cut off in the middle: it has died
            if "fatal" in message:
                self._fatal = str(message["fatal"])
            else:
                self._messages.put(message)
        self.kill()
        self._messages.put(None)

    def _end_group(self) -> None:
        """What vLLM started must not outlive it: it would hold the GPUs, and the pipe that `_read` sees end."""
        self._process.wait()
        self.kill()

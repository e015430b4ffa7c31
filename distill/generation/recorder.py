"""Finished samples to the disk: written at once, in whole lines, and reported when the disk has them.

A write survives a kill of this process as soon as it returns; a power cut only after the fsync, which a thread does
every tenth of a second, because it takes milliseconds, on a network disk tens of them, in which the teacher's loop
should go on. `durable` gives what has got there; only that is counted, verified and indexed.
"""

import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from distill.generation.asks import Flight
from distill.generation.finished import Finished, Row, index_row
from distill.generation.lines import encode
from distill.jsonl import Appender
from distill.records import Reply, Trace

_SYNC_SECONDS = 0.1


class Made(NamedTuple):
    """A finished sample."""

    flight: Flight
    trace: Trace
    reply: Reply


class Recorder:
    """Appends to traces.jsonl, and to failures.jsonl what did not become a trace."""

    def __init__(self, file: Appender, failures: Path, finished: Finished) -> None:
        self._file, self._finished = file, finished
        self._failures_path = failures
        self._failures: Appender | None = None
        self._pending: deque[tuple[Made, Row]] = deque()
        self._written = self._synced = self._taken = 0  # traces so far: in the file, on the disk, given by durable()
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._sync_now_and_then, name="fsync", daemon=True)
        self._thread.start()

    def write(self, traces: Sequence[Made]) -> None:
        """Append a line each, in one write. Raises OSError, of an earlier fsync too, and leaves no half line."""
        self._raise()
        lines, position = [], self._file.end
        for made in traces:
            line = encode(made.trace)
            self._pending.append((made, index_row(made.trace, position, "")))
            position += len(line)
            lines.append(line)
        self._file.append_lines(lines)
        self._written += len(lines)
        self._news.set()

    def fail(self, failures: Sequence[dict[str, Any]]) -> None:
        """Append lines to failures.jsonl; on the disk on return, for they are few."""
        if self._failures is None:
            self._failures = Appender(self._failures_path)
        self._failures.append_many(failures)

    def durable(self) -> list[Made]:
        """The traces that have reached the disk since the last call."""
        self._raise()
        count = self._synced - self._taken
        if not count:
            return []
        done = [self._pending.popleft() for _ in range(count)]
        self._taken += count
        self._finished.add(row for _, row in done)
        return [made for made, _ in done]

    def flush(self) -> None:
        """Bring everything to the disk; durable() then gives the rest."""
        self._halt()
        self._raise()
        self._file.sync()
        self._synced = self._written

    def _sync_now_and_then(self) -> None:
        while not self._stop.is_set():
            self._news.wait()
            self._news.clear()
            written = self._written
            if written > self._synced:
                try:
                    self._file.sync()
                except OSError as error:
                    self._error = error
                    return
                self._synced = written
            self._stop.wait(_SYNC_SECONDS)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _halt(self) -> None:
        self._stop.set()
        self._news.set()
        self._thread.join()

    def close(self) -> None:
        self._halt()
        if self._failures is not None:
            self._failures.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

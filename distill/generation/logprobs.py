"""The teacher's likeliest tokens beside the traces, packed: traces/logprobs.bin.

A trace's frame is durable before its line; a frame without a line is cut when the file is opened to be written again.
"""

from collections.abc import Container, Iterable
from pathlib import Path
from types import TracebackType

from distill.records import Reply


class LogprobsWriter:
    """Appends frames to `folder`/logprobs.bin. Open it once the finished samples are known, before the first reply.

    A kill may have left frames whose traces are not `finished` (ids of all trace lines, stale ones too): they are cut.
    """

    def __init__(self, folder: Path, finished: Container[str]) -> None:
        raise NotImplementedError

    def write(self, replies: Iterable[Reply]) -> None:
        """Frames of those replies that have log-probabilities; durable on return. Call it before their lines are
        written, which must be written in the same order."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> "LogprobsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""Which samples traces.jsonl holds, and where: known at once, also when it holds millions.

Beside the file lies an index of 32 bytes a line. It is a cache: written only when the lines are on the disk, checked
when it is opened, the lines behind it read and added, and made anew from the traces where it does not fit them.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.files import write_atomic
from distill.generation.lines import parse

if TYPE_CHECKING:
    import numpy as np

Row = tuple[int, int, float, int, int]  # id, offset, cost, prompt tokens, generated tokens
_FIELDS = [("id", "<u8"), ("offset", "<u8"), ("cost", "<f8"), ("prompt", "<u4"), ("generated", "<u4")]
_MAGIC = b"distill traces, index version 1\n"
_ROW = 32
_SPOT_CHECKS = 64
_CHUNK = 1 << 16
_READ = 1 << 16  # bytes at once: several lines, for they mostly lie in the order that they are read in
_HEAD = re.compile(rb'\{"id": ?"([^"\\]*)"')


def number(identity: str) -> int:
    """A trace's id as 64 bits; of one that is not 16 hex digits, as of somebody else's traces, a hash."""
    if len(identity) == 16:
        try:
            return int(identity, 16)
        except ValueError:
            pass
    return int.from_bytes(hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:8])


class Finished:
    """The samples in a traces.jsonl whose torn tail has been cut. Raises UserError naming a line that is no trace.

    `cost` and `tokens` are sums over all `lines`, and sums of squares. Holds 20 bytes of each line: what is added while
    it is open is only written, and seen by who opens it next.
    """

    def __init__(self, traces: Path) -> None:
        import numpy as np

        self.traces, self._index = traces, traces.with_name(f".{traces.stem}.index")
        rows, end = self._read_index()
        known = len(rows)
        added = [np.array(part, dtype=_FIELDS) for part in _chunks(_scan(traces, end, known))]
        rows = np.concatenate([rows, *added])
        data = rows[known:].tobytes()
        if known and self._index.stat().st_size == len(_MAGIC) + known * _ROW:
            with open(self._index, "ab") as file:
                file.write(data)
        else:
            write_atomic(self._index, [_MAGIC, rows.tobytes()])
        self._handle = os.open(self._index, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self.lines = len(rows)
        self.cost = rows["cost"].sum(), np.square(rows["cost"]).sum()
        tokens = rows["prompt"].astype(np.float64) + rows["generated"]
        self.tokens = tokens.sum(), np.square(tokens).sum()
        self._ids, first = np.unique(rows["id"], return_index=True)
        self._offsets = rows["offset"][first]
        self._generated = rows["generated"][first]

    def find(self, ids: "np.ndarray") -> "np.ndarray":
        """The place of each of these ids (uint64), or -1 where there is no such trace; int64."""
        import numpy as np

        if not len(self._ids):
            return np.full(len(ids), -1, dtype=np.int64)
        place = np.searchsorted(self._ids, ids)
        found = self._ids.take(place, mode="clip") == ids
        return np.where(found, place, -1)

    def having(self, ids: Sequence[int]) -> list[bool]:
        """Which of these ids are there."""
        import numpy as np

        if not len(self._ids):  # a new run asks this of every problem
            return [False] * len(ids)
        return list((self.find(np.array(ids, dtype=np.uint64)) >= 0).tolist())

    def read(self, identity: int) -> dict[str, Any]:
        """The trace of this id, which must be there."""
        import numpy as np

        [place] = self.find(np.array([identity], dtype=np.uint64))
        assert place >= 0, f"no trace {identity:016x}"
        return next(self.rows(np.array([place])))

    def rows(self, places: "np.ndarray") -> Iterator[dict[str, Any]]:
        """The traces at these places, in this order."""
        with open(self.traces, "rb", buffering=_READ) as file:
            for offset in self._offsets[places].tolist():
                file.seek(offset)
                yield parse(file.readline(), f"{self.traces}, byte {offset}")

    def generated(self, places: "np.ndarray") -> int:
        """Generated tokens of the traces at these places."""
        import numpy as np

        return int(self._generated[places].sum(dtype=np.int64))

    def __contains__(self, identity: object) -> bool:
        return isinstance(identity, str) and self.having([number(identity)])[0]

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, rows: Iterable[Row]) -> None:
        """Note lines that are on the disk, in the file's order."""
        import numpy as np

        data = np.array(list(rows), dtype=_FIELDS).tobytes()
        try:
            while data:  # a full disk may take a part, and refuse the rest
                data = data[os.write(self._handle, data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._index)) from error

    def close(self) -> None:
        os.close(self._handle)

    def _read_index(self) -> "tuple[np.ndarray, int]":
        """The rows that fit the traces, and where the line of the last one ends; none if they do not fit."""
        import numpy as np

        nothing = np.empty(0, dtype=_FIELDS), 0
        try:
            with open(self._index, "rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    return nothing
                whole = (os.fstat(file.fileno()).st_size - len(_MAGIC)) // _ROW
                rows = np.fromfile(file, dtype=_FIELDS, count=whole)
        except FileNotFoundError:
            return nothing
        with open(self.traces, "rb") as traces:
            size = os.fstat(traces.fileno()).st_size
            offsets = rows["offset"]
            rows = rows[: int(np.searchsorted(offsets, size))]  # if it is not sorted, the checks will tell
            if not len(rows) or (np.diff(rows["offset"].astype(np.int64)) <= 0).any():
                return nothing
            checked = np.unique(np.linspace(0, len(rows) - 1, _SPOT_CHECKS).astype(np.int64))
            for row in rows[checked]:
                if not _begins_line(traces.fileno(), int(row["offset"]), int(row["id"])):
                    return nothing
            traces.seek(int(rows[-1]["offset"]))
            last = traces.readline()
            return (rows, traces.tell()) if last.endswith(b"\n") else nothing


def _begins_line(handle: int, offset: int, identity: int) -> bool:
    start = max(0, offset - 1)
    data = os.pread(handle, 4096, start)
    if offset and not data.startswith(b"\n"):
        return False
    match = _HEAD.match(data, offset - start)
    return match is not None and number(match.group(1).decode("utf-8", "replace")) == identity


def _scan(path: Path, start: int, lines_before: int) -> Iterator[Row]:
    """A row for each line from byte `start` on."""
    with open(path, "rb") as file:
        file.seek(start)
        position = start
        for line_number, line in enumerate(file, start=lines_before + 1):
            if not line.isspace():
                yield index_row(parse(line, f"{path}:{line_number}"), position, f"{path}:{line_number}")
            position += len(line)


def index_row(trace: Any, offset: int, place: str) -> Row:
    """What the index keeps of a trace. Raises UserError, which names `place`, for an object that is none."""
    identity = trace.get("id")
    if not isinstance(identity, str):
        raise UserError(f"{place}: expected the field 'id' with text in it")
    try:
        generated = int(trace.get("reasoning_tokens", 0)) + int(trace.get("answer_tokens", 0))
        return number(identity), offset, float(trace.get("cost", 0.0)), int(trace.get("prompt_tokens", 0)), generated
    except (TypeError, ValueError):
        raise UserError(f"{place}: expected numbers in the fields of tokens and cost") from None


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while part := list(islice(rows, _CHUNK)):
        yield part

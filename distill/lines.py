"""A JSONL file too large for memory, by number: where each line begins, and which lines have an id.

Takes about 32 bytes a line. Lines are read again when they are wanted, from whatever process asks.
"""

import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from distill.errors import UserError
from distill.jsonl import parse_line, read_jsonl
from distill.records import Problem

if TYPE_CHECKING:
    import numpy as np

Span = tuple[int, int]  # offset and length in bytes


class Lines:
    """The lines of a JSONL file that are rows, in the file's order; a torn last line is left out.

    `fields` are the text fields to look lines up by, in the order in which our own files begin with them: those are
    read without parsing the line. Raises UserError (file and line) for a missing file, a line that is no JSON object
    or one without such a field.
    """

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        import numpy as np

        self.path = path
        self._fields = tuple(fields)
        self._head = head = re.compile(
            rb"\{" + rb", ?".join(rb'"%b": ?"([^"\\]*)"' % field.encode() for field in fields) + rb"[,}]"
        )
        offsets, lengths, keys = array("q"), array("q"), [array("q") for _ in fields]
        try:
            file = open(path, "rb")  # noqa: SIM115 (the `with` is below: this try is about opening only)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        position = 0
        with file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n") and not line.isspace():
                    match = head.match(line)
                    values = match.groups() if match else self._values(line, number, fields)
                    offsets.append(position)
                    lengths.append(len(line))
                    for column, value in zip(keys, values, strict=True):
                        column.append(hash(value))
                position += len(line)
        self.offsets, self.lengths = np.array(offsets, dtype=np.int64), np.array(lengths, dtype=np.int64)
        self.keys = {field: np.array(column, dtype=np.int64) for field, column in zip(fields, keys, strict=True)}
        self._sorted: dict[str, np.ndarray] = {}
        self._last: tuple[int, dict[str, Any]] = (-1, {})
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __len__(self) -> int:
        return len(self.offsets)

    def _values(self, line: bytes, number: int, fields: Sequence[str]) -> list[bytes]:
        row = parse_line(line, f"{self.path}:{number}")
        for field in fields:
            if not isinstance(row.get(field), str):
                raise UserError(f"{self.path}:{number}: expected the field '{field}' with text in it")
        return [row[field].encode("utf-8", "surrogatepass") for field in fields]

    def value(self, line: int, field: str) -> str:
        """One of the fields to look up by; the line is parsed only where it does not begin with them."""
        begin, length = self.span(line)
        data = os.pread(self._handle, min(length, 512), begin)
        match = self._head.match(data)
        if match is None:
            return cast(str, json.loads(self.read(line))[field])
        return match.group(self._fields.index(field) + 1).decode("utf-8", "surrogatepass")

    def find(self, field: str, keys: "np.ndarray") -> "np.ndarray":
        """The first line with each of these keys in `field` (see key()), or -1; int64."""
        import numpy as np

        own = self.keys[field]
        if not len(own):
            return np.full(len(keys), -1, dtype=np.int64)
        if field not in self._sorted:
            self._sorted[field] = np.argsort(own, kind="stable")
        order = self._sorted[field]
        place = np.searchsorted(own, keys, sorter=order)
        found = order.take(place, mode="clip")
        return np.where(own[found] == keys, found, -1)

    def span(self, line: int) -> Span:
        return int(self.offsets[line]), int(self.lengths[line])

    def read(self, line: int) -> bytes:
        begin, length = self.span(line)
        return os.pread(self._handle, length, begin)

    def parsed(self, line: int) -> dict[str, Any]:
        """The row; the last one asked for is kept, since its fields are asked for one by one."""
        if self._last[0] != line:
            self._last = (line, json.loads(self.read(line)))
        return self._last[1]

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


def key(value: str) -> int:
    """What Lines looks a value up by: a hash of 64 bits, the same within one process only."""
    return hash(value.encode("utf-8", "surrogatepass"))


class StoredProblems(Mapping[str, Problem]):
    """problems.jsonl as a mapping by id, read line by line when asked."""

    def __init__(self, path: Path) -> None:
        self.lines = Lines(path, ("id",))
        self._parsed = lru_cache(maxsize=4096)(self._parse)

    def __getitem__(self, identity: str) -> Problem:
        import numpy as np

        line = int(self.lines.find("id", np.array([key(identity)], dtype=np.int64))[0])
        if line < 0:
            raise KeyError(identity)
        return self._parsed(line)

    def at(self, line: int) -> Problem:
        return self._parsed(line)

    def _parse(self, line: int) -> Problem:
        return cast(Problem, json.loads(self.lines.read(line)))

    def __iter__(self) -> Iterator[str]:
        return (row["id"] for _, row in read_jsonl(self.lines.path))

    def __len__(self) -> int:
        return len(self.lines)

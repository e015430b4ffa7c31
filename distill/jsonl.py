"""JSON lines that survive a kill: appended durably, a torn tail cut when the file is opened again."""

import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.errors import UserError
from distill.files import sync_folder, write_atomic

Row = dict[str, Any]


def read_jsonl(path: Path | str, *, torn_ok: bool = False) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) for each line; blank lines are skipped.

    `torn_ok` passes over a last line without its newline, as a killed writer leaves it (an Appender would cut it).
    A name that ends in .gz is read through gzip. Raises UserError naming file and line if the file is missing, not
    gzip although named so, or a line is not a JSON object.
    """
    path = Path(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 (the `with` is below: this try is about opening only)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a JSONL file") from None
    with file:
        number = 0
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file, start=1):
                if not line.strip() or (torn_ok and not line.endswith(b"\n")):
                    continue
                yield number, parse_line(line, f"{path}:{number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a whole gzip file after line {number} ({error})") from None


def parse_line(line: bytes, place: str) -> Row:
    """The object on a line. Raises UserError, which names `place`, for anything else."""
    try:
        row = json.loads(line.rstrip())  # else the column of what is missing at the end would be the next line's
    except UnicodeDecodeError:
        raise UserError(f"{place}: the line is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: the line is not valid JSON ({error.msg} at column {error.colno})") from None
    except ValueError:
        most = sys.get_int_max_str_digits()
        raise UserError(
            f"{place}: the line has a whole number of more than {most} digits, expected it as text"
        ) from None
    except RecursionError:
        raise UserError(f"{place}: the line is not valid JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return row


def encode_row(row: Row) -> bytes:
    """One line with its newline: readable UTF-8, but for lone surrogates, which only escapes can carry."""
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n").encode()


def write_jsonl_atomic(path: Path | str, rows: Iterable[Row]) -> int:
    """Write the whole file or nothing; returns the number of rows."""
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for row in rows:
            count += 1
            yield encode_row(row)

    write_atomic(Path(path), lines())
    return count


class Appender:
    """Append rows to `path`; when append() returns, the row is on the disk.

    Opening cuts what a killed writer left unfinished; `torn` counts the lines cut. One writer at a time
    (RunFolder's lock sees to it).
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self.torn = 0
        self._end = self._cut_torn_tail()
        if is_new:
            sync_folder(self.path.parent)

    def append(self, row: Row, *, sync: bool = True) -> None:
        self.append_many([row], sync=sync)

    def append_many(self, rows: Iterable[Row], *, sync: bool = True) -> None:
        """One write and one fsync for the whole batch. Raises OSError (path in `filename`) and leaves no half line.

        With `sync` false the rows survive a kill of this process at once, but a power cut only after sync().
        """
        self.append_lines((encode_row(row) for row in rows), sync=sync)

    def append_lines(self, lines: Iterable[bytes], *, sync: bool = False) -> None:
        """As append_many, of lines that are encoded already, each with its newline."""
        data = memoryview(b"".join(lines))
        position = self._end
        try:
            while position - self._end < len(data):
                position += os.pwrite(self._handle, data[position - self._end :], position)
            if sync:
                os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, self._end)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._end = position

    @property
    def end(self) -> int:
        """Where the next line will begin, in bytes."""
        return self._end

    def sync(self) -> None:
        """Bring to the disk what was appended without. Raises OSError with the path in `filename`."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> "Appender":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut_torn_tail(self) -> int:
        """Truncate after the last line that is whole; returns the new length in bytes."""
        end = os.fstat(self._handle).st_size
        while end > 0:
            start = self._line_start(end)
            line = os.pread(self._handle, end - start, start)
            # A newline alone is no proof: after a power cut the tail may hold blocks of zeros.
            if line.endswith(b"\n") and _is_row(line):
                break
            self.torn += 1
            end = start
        if self.torn:
            os.ftruncate(self._handle, end)
            os.fsync(self._handle)
        return end

    def _line_start(self, end: int) -> int:
        """Offset of the first byte of the line whose last byte is at end - 1."""
        position = end - 1
        while position > 0:
            step = min(65536, position)
            found = os.pread(self._handle, step, position - step).rfind(b"\n")
            if found >= 0:
                return position - step + found + 1
            position -= step
        return 0


def _is_row(line: bytes) -> bool:
    try:
        return not line.strip() or isinstance(json.loads(line), dict)
    except ValueError:
        return False

"""The rows of a file, a folder of files or a `datasets` source, one by one, from where an earlier reading stopped."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from distill.errors import UserError
from distill.jsonl import parse_line
from distill.recipe import ForeignTraces, ProblemSource

_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst")
_SUFFIXES = (*_LINES, ".parquet")
_BATCH = 128  # rows of a Parquet file in memory at once
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # as datasets' save_to_disk leaves them


class Position(NamedTuple):
    """What has been read: `file` files whole, and of the next `row` rows, which end at `offset` where files have
    lines that are not compressed."""

    file: int = 0
    row: int = 0
    offset: int = 0


class Row(NamedTuple):
    after: Position
    place: str  # "file:line", for messages
    row: dict[str, Any] | None  # None for a line that is no JSON object; `error` says why
    error: str | None = None


def rows(settings: ForeignTraces, field: str, start: Position) -> Iterator[Row]:
    """Every row after `start`. `field` is the section's name in the recipe, for messages.

    Raises UserError for a source that is missing, has no such split, or is broken beyond single lines.
    """
    files = source_files(settings, field)
    if files is None:
        yield from _dataset(settings, field, start)
        return
    for number, path in enumerate(files[start.file :], start=start.file):
        begin = start if number == start.file else Position(number)
        yield from _parquet(path, begin) if path.suffix == ".parquet" else _lines(path, begin)
        yield Row(Position(number + 1), str(path), {}, "")  # the file is done


def is_end(row: Row) -> bool:
    """Whether this only says that a file has been read whole."""
    return row.error == ""


def source_files(settings: ForeignTraces, field: str) -> list[Path] | None:
    """The source's files, or None if `datasets` has to load it. Raises UserError if there are none."""
    path = Path(settings.source)
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise UserError(f"{path}: expected the name to end in {', '.join(_SUFFIXES)} ({field}.source)")
        return [path]
    if not path.is_dir():
        if settings.source.endswith(_SUFFIXES):
            raise UserError(f"{path}: no such file ({field}.source)")
        return None
    if any((path / name).is_file() for name in _SAVED):
        return None
    found = [p for p in path.iterdir() if p.name.endswith(_SUFFIXES)] or list(path.rglob("*"))
    files = sorted(
        p
        for p in found
        if p.is_file() and p.name.endswith(_SUFFIXES) and not any(x.startswith(".") for x in p.relative_to(path).parts)
    )
    if not files:
        raise UserError(f"{path}: no file in the folder ends in {', '.join(_SUFFIXES)} ({field}.source)")
    if settings.split is not None:
        named = [p for p in files if settings.split in p.relative_to(path).as_posix().replace("/", "-").split("-")
                 or p.name.split(".")[0] == settings.split]  # fmt: skip
        if not named:
            names = ", ".join(p.relative_to(path).as_posix() for p in files[:8])
            raise UserError(f"{field}.split: no file of {path} has '{settings.split}' in its name; it has {names}")
        files = named
    return files


def _lines(path: Path, start: Position) -> Iterator[Row]:
    plain = path.suffix not in (".gz", ".zst")
    offset = start.offset if plain else 0
    skip = 0 if plain else start.row
    number = start.row if plain else 0
    try:
        with _open(path) as file:
            if plain:
                file.seek(offset)
            for line in file:
                number += 1
                offset += len(line)
                if number <= skip or not line.strip():
                    continue
                after, place = Position(start.file, number, offset), f"{path}:{number}"
                try:
                    yield Row(after, place, parse_line(line, place))
                except UserError as error:
                    yield Row(after, place, None, str(error).removeprefix(f"{place}: "))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file after line {number} ({error})") from None
    except OSError as error:
        if path.suffix == ".zst" and error.errno is None:  # pyarrow's own
            raise UserError(f"{path}: not a whole zstd file after line {number} ({error})") from None
        raise


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import io

        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), 1 << 20)
    return open(path, "rb")


def _parquet(path: Path, start: Position) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Buffered, so that a file of one huge row group is not read whole.
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    with file:
        number = 0
        groups: list[int] = []  # those not read whole yet
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if groups or number + size > start.row:
                groups.append(group)
            else:
                number += size
        for batch in file.iter_batches(batch_size=_BATCH, row_groups=groups):
            for row in batch.to_pylist():
                number += 1
                if number > start.row:
                    yield Row(Position(start.file, number), f"{path}: row {number}", row)


def _dataset(settings: ForeignTraces, field: str, start: Position) -> Iterator[Row]:
    from distill.problem_sources import source_rows

    if start.file:
        return
    source = ProblemSource(source=settings.source, split=settings.split)
    for number, (place, row) in enumerate(source_rows(source, field), start=1):
        if number > start.row:
            yield Row(Position(0, number), place, row)
    yield Row(Position(1), settings.source, {}, "")

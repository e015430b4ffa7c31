"""The finished stage's table, traces.parquet, for other tools: the current traces in the plan's order, streamed."""

import io
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from distill.files import write_atomic
from distill.generation.finished import Finished
from distill.generation.plan import Planner
from distill.generation.survey import ProblemFile
from distill.records import Trace

if TYPE_CHECKING:
    import pyarrow

_PROBLEMS = 256  # looked up at once
_PART_BYTES = 1 << 20  # of text that is held as Python's objects
_PARTS = 16  # in a row group, which is held as Arrow's columns


def current_traces(problems: ProblemFile, planner: Planner, finished: Finished) -> Iterator[Trace]:
    """The traces that the recipe asks for, in the plan's order; those of other settings are passed over."""
    import numpy as np

    walk = problems.walk()
    while chunk := [problem for _, problem in islice(walk, _PROBLEMS)]:
        ids = [identity for problem in chunk for identity in planner.ids(problem, 0, planner.most)]
        places = finished.find(np.array(ids, dtype=np.uint64))
        yield from cast(Iterator[Trace], finished.rows(places[places >= 0]))


def write_table(traces: Iterable[Trace], path: Path, settings: dict[str, Any], with_endpoint: bool) -> None:
    """Write `path`, whole or not at all. `settings`: what every trace's `sampling` is, but for the seed."""
    write_atomic(path, _parquet(traces, _schema(settings, with_endpoint)))


def _schema(settings: dict[str, Any], with_endpoint: bool) -> "pyarrow.Schema":
    import pyarrow as pa

    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    sampling = pa.struct([(name, kinds[type(value)]) for name, value in settings.items()])
    columns: list[tuple[str, Any]] = [
        ("id", pa.string()), ("problem_id", pa.string()), ("sample", pa.int64()), ("messages", pa.list_(message)),
        ("reasoning", pa.string()), ("response", pa.string()), ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()), ("reasoning_tokens", pa.int64()), ("answer_tokens", pa.int64()),
        ("seconds", pa.float64()), ("cost", pa.float64()), ("attempts", pa.int64()),
        *([("endpoint", pa.string())] if with_endpoint else []),
        ("teacher", pa.string()), ("sampling", sampling), ("text", pa.string()),
    ]  # fmt: skip
    return pa.schema(columns)


def _parquet(traces: Iterable[Trace], schema: "pyarrow.Schema") -> Iterator[bytes]:
    """The file's bytes, a row group at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    sink = _Sink()
    with parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
        parts = (_table(rows, schema) for rows in _pieces(traces))
        while group := list(islice(parts, _PARTS)):
            writer.write_table(pa.concat_tables(group))
            yield sink.take()
    yield sink.take()


def _pieces(traces: Iterable[Trace]) -> Iterator[list[Trace]]:
    """Few enough at a time that the memory of some is used again for the next: new memory costs more than parsing."""
    rows: list[Trace] = []
    size = 0
    for trace in traces:
        rows.append(trace)
        size += 2 * len(trace["text"]) + 1000
        if size >= _PART_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _table(rows: list[Any], schema: "pyarrow.Schema") -> "pyarrow.Table":
    try:
        return _columns(rows, schema)
    except UnicodeEncodeError:  # a lone surrogate, which Arrow's strings cannot hold
        return _columns([_sound(row) for row in rows], schema)


def _columns(rows: list[Any], schema: "pyarrow.Schema") -> "pyarrow.Table":
    """As Table.from_pylist, in half its time."""
    import pyarrow as pa

    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _sound(value: Any) -> Any:
    """`value` with U+FFFD in place of lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {name: _sound(item) for name, item in value.items()}
    return [_sound(item) for item in value] if isinstance(value, list) else value


class _Sink(io.RawIOBase):
    """Holds what was written until it is taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._position += len(part)
        return len(part)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)

"""Problems from a file or a `datasets` source, through a field mapping.

    problems: {source: path/to/gsm8k_train.jsonl, problem: question, answer: answer}

A field may be dotted ("reward_model.ground_truth", "messages.0.content"). Every row that cannot be used is
an error that names its place and field: a source that silently loses rows gives another training set than
the one its user has read.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.identity import problem_hash
from distill.jsonl import read_jsonl
from distill.recipe import Kind, ProblemSource
from distill.records import Problem

Row = dict[str, Any]
_FILE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".parquet")
_JSON_KINDS = ("code", "choice", "reasoning-gym")  # whose references may be more than text
_META_TEXT = 2000  # longest text of another field that is kept in `meta`: subjects and links, not whole solutions


def source_problems(source: ProblemSource, field: str) -> Iterator[Problem]:
    """Every row of the source as a Problem, in its order, repetitions included.

    `field` is the recipe's name for the source ("problems"), for messages. Raises UserError for a missing
    file, a line that does not parse, a row without a named field, or a `datasets` source that does not load.
    """
    name = Path(source.source).name.split(".")[0]
    for place, row in source_rows(source, field):
        yield _problem(source, field, name, place, row)


def source_rows(source: ProblemSource, field: str) -> Iterator[tuple[str, Row]]:
    """(place for messages, row) of each row of a file, a folder or a `datasets` name."""
    path = Path(source.source)
    if source.source.endswith(_FILE_SUFFIXES):
        if not path.is_file():
            raise UserError(f"{path}: no such file ({field}.source)")
        return _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    if path.is_file():
        raise UserError(f"{path}: expected the name to end in {', '.join(_FILE_SUFFIXES)} ({field}.source)")
    return _dataset_rows(source, field)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    for number, row in read_jsonl(path):
        yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    with file:
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row


def _dataset_rows(source: ProblemSource, field: str) -> Iterator[tuple[str, Row]]:
    """Rows of a `datasets` folder or hub name; "name:config" picks a configuration ("openai/gsm8k:main")."""
    import datasets

    datasets.disable_progress_bars()
    path, (name, _, config) = Path(source.source), source.source.partition(":")
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(path))
        elif path.is_dir():
            data = datasets.load_dataset(str(path))
        else:
            data = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library raises its own, the hub's, arrow's and the parsers' errors here
        # "An error occurred while generating the dataset" hides what the parser said.
        cause = error.__cause__ or error
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise UserError(f"{field}.source: `datasets` cannot load '{source.source}': {reason}") from error
    if isinstance(data, datasets.DatasetDict):
        if source.split is None and len(data) > 1:
            raise UserError(f"{field}.split: '{source.source}' has the splits {', '.join(data)}; name one")
        split = source.split or next(iter(data))
        if split not in data:
            raise UserError(f"{field}.split: '{source.source}' has no split '{split}'; it has {', '.join(data)}")
        data = data[split]
    for index, row in enumerate(data):
        yield f"{source.source}: row {index + 1}", dict(row)


def _problem(source: ProblemSource, field: str, name: str, place: str, row: Row) -> Problem:
    text = _text(row, source.problem, place, f"{field}.problem")
    if not text or not text.strip():
        raise UserError(f"{place}: the field '{source.problem}' ({field}.problem) is empty, expected a problem")
    answer = _text(row, source.answer, place, f"{field}.answer", source.kind) if source.answer else None
    used = {source.problem, source.answer}
    meta = {k: v for k, v in row.items() if k not in used and _is_small(v)} | {"family": name}
    if source.id:
        meta["source_id"] = _text(row, source.id, place, f"{field}.id")
    return {
        "id": problem_hash(text)[:16],
        "problem": text.strip(),
        "answer": _entry(source, row, text, answer) if source.kind == "reasoning-gym" else _final(answer, source.kind),
        "kind": source.kind,
        "source": Path(source.source).name if Path(source.source).exists() else source.source,
        "meta": meta,
    }


def _final(answer: str | None, kind: Kind) -> str | None:
    """The reference itself: GSM8K's worked solutions end in '#### 1,234'. Blank means none."""
    if answer is not None and kind in ("math", "exact") and "####" in answer:
        answer = answer.rsplit("####", 1)[1].replace(",", "")
    return (answer or "").strip() or None


def _entry(source: ProblemSource, row: Row, text: str, answer: str | None) -> str | None:
    """What reasoning-gym's scorers want, from its own rows too (question, answer, metadata)."""
    metadata = row.get("metadata")
    if answer is None or not isinstance(metadata, dict) or "source_dataset" not in metadata:
        return answer
    return json.dumps({"question": text, "answer": answer, "metadata": metadata}, default=str)


def _text(row: Row, name: str, place: str, field: str, kind: Kind = "math") -> str | None:
    """The field as text; numbers are written out, tests too, null stays None."""
    value = _lookup(row, name, place, field)
    if kind in _JSON_KINDS and isinstance(value, dict | list):
        return json.dumps(value, default=str)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{place}: the field '{name}' ({field}) is {value}, expected text or a finite number")
    if isinstance(value, str) and (lone := re.search("[\ud800-\udfff]", value)):
        raise UserError(
            f"{place}: the field '{name}' ({field}) holds half a surrogate pair ({lone.group()!a}), "
            "which no tokenizer reads; expected Unicode text"
        )
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{place}: the field '{name}' ({field}) is a {type(value).__name__}, expected text or a number")


def _lookup(row: Row, name: str, place: str, field: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            known = [str(key) for key in row]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; it has {', '.join(known[:12]) or 'no fields'}"
            raise UserError(f"{place}: the row has no field '{name}' ({field}){hint}")
    return value


def _is_small(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (int, bool)) or (isinstance(value, str) and len(value) <= _META_TEXT)

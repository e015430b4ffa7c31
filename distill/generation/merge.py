"""Shards: parts of one run's traces made on several machines, each in a run folder of its own, and put together.

Folders of their own, because then nothing is shared while they work: no lock has to hold over a network, no two
machines append to one file, and a shard is resumed, stopped and looked at like any other run. Merging only adds lines
that are not there yet, so it can be interrupted, repeated, and done while shards are still at work.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.files import sha256_file, write_atomic
from distill.generation.finished import Finished, Row, index_row, number
from distill.generation.lines import parse
from distill.generation.logprobs import NAME as LOGPROBS
from distill.generation.logprobs import LogprobsReader, LogprobsWriter
from distill.generation.plan import sampling_record
from distill.generation.record import merge_accounts
from distill.jsonl import Appender
from distill.manifest import Manifest
from distill.recipe import Recipe
from distill.recipe_load import load_recipe
from distill.runfolder import RunFolder, Shard

_TOGETHER = 4 << 20  # bytes of lines appended at once


def parse_shard(text: str) -> Shard:
    """'2/8': the second of eight. Raises UserError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text}: expected I/N, the I-th of N parts, from 1/N to N/N")
    return int(match[1]), int(match[2])


def shard_folder(folder: Path, shard: Shard) -> Path:
    """runs/NAME.shard-2-of-8 for runs/NAME."""
    return folder.with_name(f"{folder.name}.shard-{shard[0]}-of-{shard[1]}")


def merge(out: Path, runs: Sequence[Path]) -> str:
    """Add the traces of `runs` that are not in `out` yet, and their grades. Returns what there is to say about it.

    `out` becomes a run of the whole plan, with the problems of `runs` if it is new. Raises UserError if the runs do
    not ask the same teacher for the same, or `out` is in use.
    """
    if out.resolve() in [run.resolve() for run in runs]:
        raise UserError(f"{out}: cannot be filled from itself; name another folder first")
    for source in runs:
        if not (source / "traces" / "traces.jsonl").is_file():
            raise UserError(f"{source}: has no traces/traces.jsonl; expected a run folder to merge from")
    recipe = _common_recipe([*([out] if (out / "recipe.yaml").is_file() else []), *runs])
    with RunFolder.open(out, recipe) as run:
        if run.shard is not None:
            raise UserError(f"{out}: is a shard itself; merge into a folder of its own")
        _adopt(run, runs[0])
        added, there = 0, 0
        for source in runs:
            more, known = _add_traces(run, source)
            added, there = added + more, there + known
            _add_grades(run, source)
            merge_accounts(source / "traces", run.path("traces"))
    return (
        f"{out}: {added} traces added from {len(runs)} folder{'s' if len(runs) > 1 else ''}, {there} were there; "
        f"`distill traces {out}` makes what is missing and the table"
    )


def _common_recipe(runs: Sequence[Path]) -> Recipe:
    """The recipe of the first run, if all others ask its teacher for the same about the same problems."""
    first: tuple[Path, dict[str, Any]] | None = None
    recipe: Recipe | None = None
    for run in runs:
        own = load_recipe(run)
        teacher = Manifest(run / "manifest.json").data.get("teacher", {}).get("id")
        problems = run / "problems.jsonl"
        asks = {
            "seed": own.seed,
            **{f"sampling.{name}": value for name, value in sampling_record(own.sampling, 0).items()},
            "teacher": teacher,
            "problems.jsonl": sha256_file(problems)[:12] if problems.is_file() else None,
        }
        if first is None:
            first, recipe = (run, asks), own
        for name, value in asks.items():
            if first[1].get(name) != value:
                raise UserError(
                    f"{run}: {name} is {value!r}, but {first[1].get(name)!r} in {first[0]}; only runs that ask the "
                    "same teacher for the same can be merged"
                )
    assert recipe is not None
    return recipe


def _adopt(run: RunFolder, source: Path) -> None:
    """Give a new folder what a run has before its traces: problems, and what the manifest says of them."""
    manifest = Manifest(source / "manifest.json").data
    for name in ("problems.jsonl", "eval_problems.jsonl"):
        if (source / name).is_file() and not run.path(name).is_file():
            write_atomic(run.path(name), (source / name).read_bytes())
    if "problems" not in run.manifest.data["stages"] and "problems" in manifest["stages"]:
        run.manifest.data["stages"]["problems"] = manifest["stages"]["problems"]
        run.manifest.update(teacher=manifest.get("teacher"), problems=manifest.get("problems"))
    run.write_recipe()


def _add_traces(run: RunFolder, source: Path) -> tuple[int, int]:
    """(traces added, traces that were there)."""
    path = run.path("traces", "traces.jsonl")
    added = there = 0
    with ExitStack() as stack:
        file = stack.enter_context(Appender(path))
        finished = stack.enter_context(closing(Finished(path)))
        logprobs: tuple[LogprobsWriter, LogprobsReader] | None = None
        if (source / "traces" / LOGPROBS).is_file():
            writer = stack.enter_context(LogprobsWriter(path.parent, finished))
            logprobs = writer, stack.enter_context(LogprobsReader(source))
        new: set[int] = set()
        for batch in _batches(source / "traces" / "traces.jsonl"):
            lines: list[bytes] = []
            rows: list[Row] = []
            position = file.end
            for (line, row), is_there in zip(batch, finished.having([row[0] for _, row in batch]), strict=True):
                if is_there or row[0] in new:
                    there += 1
                    continue
                new.add(row[0])
                lines.append(line)
                rows.append((row[0], position, *row[2:]))
                position += len(line)
            if logprobs:
                writer, reader = logprobs
                writer.copy(reader, [parse(line, f"{source}")["id"] for line in lines])
            file.append_lines(lines, sync=True)
            finished.add(rows)
            added += len(lines)
    return added, there


def _batches(path: Path) -> Iterator[list[tuple[bytes, Row]]]:
    """Whole lines; the last one of a run at work may not be."""
    batch: list[tuple[bytes, Row]] = []
    size = 0
    with open(path, "rb") as file:
        for count, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or line.isspace():
                continue
            place = f"{path}:{count}"
            batch.append((line, index_row(parse(line, place), 0, place)))
            size += len(line)
            if size >= _TOGETHER:
                yield batch
                batch, size = [], 0
    yield batch


def _add_grades(run: RunFolder, source: Path) -> None:
    path, other = run.path("traces", "grades.jsonl"), source / "traces" / "grades.jsonl"
    if not other.is_file():
        return
    with Appender(path) as file:
        known = {number(parse(line, f"{path}")["key"]) for line in path.read_bytes().splitlines()}
        lines = [line for line in other.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        file.append_lines([line for line in lines if number(parse(line, f"{other}")["key"]) not in known], sync=True)

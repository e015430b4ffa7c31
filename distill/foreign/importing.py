"""The stages 'problems' and 'traces' of a recipe that names traces: an import instead.

Rows are streamed; in memory are two numbers a problem and one a trace. What was read and written is noted together in
.import.json every few megabytes, so that a killed import goes on from there: files are cut back to what was noted,
and the sources are read on from the row after it. Trace ids are hashes of content: the same trace in two sources is
one.
"""

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from distill.errors import UserError
from distill.files import sha256_json, sha256_tree, write_json_atomic
from distill.foreign.layouts import choose_layout, named_layout
from distill.foreign.mapping import Count, Reading, Sample, Unmapped, samples, source_name
from distill.foreign.sources import Position, Row, is_end, rows
from distill.jsonl import Appender, read_jsonl, write_jsonl_atomic
from distill.problems import build_problems, set_hash
from distill.recipe import ForeignTraces, Recipe
from distill.records import Problem

if TYPE_CHECKING:
    from distill.progress import Progress
    from distill.runfolder import RunFolder

VERSION = 2
_FLUSH_BYTES = 1 << 23
_FLUSH_ROWS = 4096
_PROBE = 1000  # rows of a source after which one that gave no trace is taken for a mistake in the recipe
_FILES = ("problems.jsonl", "traces/traces.jsonl", "traces/skipped.jsonl")
_COUNTS = ("rows", "skipped", "problems", "traces", "repeats", "evaluation", "answers_ignored")
_IDS = re.compile(rb'\{"id": ?"([0-9a-f]{16})"(?:, ?"problem_id": ?"([0-9a-f]{16})")?')


def run(recipe: Recipe, run: "RunFolder") -> dict[str, Any]:
    """Write problems.jsonl, eval_problems.jsonl, traces/traces.jsonl and traces/skipped.jsonl. Returns the facts.

    skipped.jsonl names what could not be mapped by place, field and reason. Raises UserError for a source that
    cannot be read or gives no trace, and if the folder holds traces that a teacher made.
    """
    held: list[Problem] = []
    if recipe.evals.problems is not None:
        held, _ = build_problems(recipe.evals.problems, "evals.problems", "heldout")
    job = _Import(recipe, run, {int(problem["id"], 16) for problem in held})
    with run.progress("import", None, "traces", done=job.total("traces")) as progress:
        for number in range(job.source, len(recipe.traces)):
            job.read(number, progress)
    return job.finish(held)


class _Import:
    """What an import knows, from batch to batch."""

    def __init__(self, recipe: Recipe, run: "RunFolder", held: set[int]) -> None:
        self.recipe, self.run, self.held = recipe, run, held
        self.hashes = [sha256_tree(Path(source.source)) for source in recipe.traces]
        settings = [source.model_dump() for source in recipe.traces]
        self.key = sha256_json([VERSION, settings, self.hashes, sorted(held)])
        self.note = run.path(".import.json")
        noted = _read_note(self.note)
        there = run.path("traces", "traces.jsonl")
        # An empty file is what an import leaves that failed on its first row.
        if noted is None and "imported" not in run.manifest.data and there.is_file() and there.stat().st_size:
            raise UserError(f"{there}: these traces were not imported, and would be lost; give the recipe another name")
        if noted is None or noted["key"] != self.key:
            noted = {"source": 0, "position": Position(), "sizes": [0, 0, 0], "layouts": [], "counts": []}
        self.source: int = noted["source"]
        self.position = Position(*noted["position"])
        self.layouts: list[str] = noted["layouts"]
        self.counts: list[dict[str, Any]] = noted["counts"]
        self.files = [_cut(run.path(*name.split("/")), size) for name, size in zip(_FILES, noted["sizes"], strict=True)]
        self.waiting: tuple[list[Any], ...] = ([], [], [])
        self.bytes = self.rows = 0
        # By problem: twice its number of samples, plus one if it has an answer.
        self.known: dict[int, int] = {}
        self.ids: set[int] = set()
        self._remember()

    def total(self, name: str) -> int:
        return sum(counts[name] for counts in self.counts)

    def _remember(self) -> None:
        """The problems and traces that an earlier attempt wrote."""
        for head, line in _heads(self.run.path("problems.jsonl")):
            self.known[int(head[1], 16)] = int(b'"answer": null' not in line)
        for head, _ in _heads(self.run.path("traces", "traces.jsonl")):
            self.ids.add(int(head[1], 16))
            self.known[int(head[2], 16)] += 2

    def read(self, number: int, progress: "Progress") -> None:
        """One source, to its end or to its `count`."""
        settings = self.recipe.traces[number]
        field = f"traces.{number}"
        if len(self.counts) <= number:
            self.counts.append(dict.fromkeys(_COUNTS, 0) | {"teachers": {}})
        counts = self.counts[number]
        reading: Reading | None = None
        first: str | None = None
        for found in rows(settings, field, self.position):
            if not is_end(found):
                if settings.count is not None and counts["rows"] >= settings.count:
                    break
                counts["rows"] += 1
                try:
                    if found.row is None:
                        raise Unmapped("", str(found.error))
                    if reading is None:
                        reading = self._reading(number, settings, field, found)
                    for sample in samples(reading, found.place, found.row):
                        if isinstance(sample, Unmapped):
                            first = self._skip(found.place, sample, counts, first)
                        else:
                            self._add(sample, counts)
                except Unmapped as wrong:
                    first = self._skip(found.place, wrong, counts, first)
                if counts["rows"] == _PROBE and not counts["traces"] and not counts["evaluation"]:
                    raise UserError(f"{first} ({field}: none of the first {_PROBE} rows gave a trace)")
            self.position = found.after
            self.rows += 1
            if self.bytes >= _FLUSH_BYTES or self.rows >= _FLUSH_ROWS:
                progress.advance(self._flush(number))
        if not counts["traces"] and not counts["evaluation"] and not counts["repeats"]:
            raise UserError(f"{first or settings.source + ': holds no rows'} ({field}: no row gave a trace)")
        self.position = Position()
        progress.advance(self._flush(number + 1))

    def _reading(self, number: int, settings: ForeignTraces, field: str, found: Row) -> Reading:
        if len(self.layouts) > number:  # go on with what was found to be the layout
            layout = named_layout(self.layouts[number], settings)
        else:
            assert found.row is not None
            layout = choose_layout(settings, found.row, found.place, field)
            self.layouts.append(layout.name)
        name = settings.name or source_name(settings.source)
        return Reading(layout, name, settings.unmarked, _counter(settings.tokenizer, field))

    def _skip(self, place: str, wrong: Unmapped, counts: dict[str, Any], first: str | None) -> str:
        """Note it; returns what to say of the first one."""
        counts["skipped"] += 1
        self.waiting[2].append({"place": place, "field": wrong.field, "reason": wrong.reason})
        return first or f"{place}: {wrong.field + ' ' if wrong.field else ''}{wrong.reason}"

    def _add(self, sample: Sample, counts: dict[str, Any]) -> None:
        problem, trace = sample
        number = int(problem["id"], 16)
        if number in self.held:
            counts["evaluation"] += 1
            return
        identity = int(trace["id"], 16)
        if identity in self.ids:
            counts["repeats"] += 1
            return
        self.ids.add(identity)
        known = self.known.get(number)
        if known is None:
            known = int(problem["answer"] is not None)
            self.waiting[0].append(problem)
            counts["problems"] += 1
        elif not known & 1 and problem["answer"] is not None:
            counts["answers_ignored"] += 1
        trace["sample"] = known >> 1
        self.known[number] = known + 2
        self.waiting[1].append(trace)
        self.bytes += 2 * len(trace["text"])
        counts["traces"] += 1
        counts["teachers"][trace["teacher"]] = counts["teachers"].get(trace["teacher"], 0) + 1

    def _flush(self, source: int) -> int:
        """Bring all that waits to the disk, then the note that it is there; returns the number of traces."""
        for file, waiting in zip(self.files, self.waiting, strict=True):
            if waiting:
                file.append_many(waiting)
        made = len(self.waiting[1])
        for waiting in self.waiting:
            waiting.clear()
        self.bytes = self.rows = 0
        self.source = source
        sizes = [os.path.getsize(file.path) for file in self.files]
        write_json_atomic(self.note, {
            "key": self.key, "source": source, "position": self.position, "sizes": sizes, "layouts": self.layouts,
            "counts": self.counts,
        })  # fmt: skip
        return made

    def finish(self, held: list[Problem]) -> dict[str, Any]:
        for file in self.files:
            file.close()
        self.known.clear()
        self.ids.clear()
        totals = {name: self.total(name) for name in _COUNTS}
        if not totals["traces"]:
            raise UserError(f"traces: all {totals['evaluation']} traces are of evaluation problems (evals.problems)")
        write_jsonl_atomic(self.run.path("eval_problems.jsonl"), cast(list[dict[str, Any]], held))
        without = array("b")
        asked = (cast(Problem, row) for _, row in read_jsonl(self.run.path("problems.jsonl")))

        def counted() -> Iterator[Problem]:
            for problem in asked:
                without.append(problem["answer"] is None)
                yield problem

        proof = {
            "train": {"count": totals["problems"], "sha256": set_hash(counted()), "without_answer": sum(without)},
            "eval": {
                "count": len(held), "sha256": set_hash(held), "without_answer": sum(p["answer"] is None for p in held),
            },
            "overlap": 0,
            "dropped": {"overlap": totals["evaluation"], "repeats": totals["repeats"]},
        }  # fmt: skip
        self.run.manifest.data.pop("teacher", None)
        self.run.manifest.update(problems=proof, imported=[self._told(number) for number in range(len(self.counts))])
        self.note.unlink(missing_ok=True)
        self._tell(totals)
        return {"tokens": 0, "train": totals["problems"], "eval": len(held), **totals}

    def _told(self, number: int) -> dict[str, Any]:
        settings, counts = self.recipe.traces[number], dict(self.counts[number])
        teachers = Counter(counts.pop("teachers"))
        path = Path(settings.source)
        return {
            "name": settings.name or source_name(settings.source),
            "source": path.name if path.exists() else settings.source,
            "sha256": self.hashes[number],
            "layout": self.layouts[number],
            "licence": named_layout(self.layouts[number], settings).licence,
            "licence_field": settings.fields.licence,
            "teachers": dict(teachers.most_common(20)),
            "tokens": "counted" if settings.tokenizer else "estimated",
            **counts,
        }

    def _tell(self, totals: dict[str, int]) -> None:
        console = Console(stderr=True, highlight=False)
        if totals["skipped"]:
            place = self.run.path("traces", "skipped.jsonl")
            first = next(row for _, row in read_jsonl(place))
            what = f"{first['field']} {first['reason']}".strip()  # a line that is no JSON has no field
            console.print(
                f"import    {totals['skipped']:,} of {totals['rows']:,} rows or generations could not be mapped; the "
                f"first: {first['place']}: {what}; all are in {place}", soft_wrap=True,
                markup=False,
            )  # fmt: skip


def _read_note(path: Path) -> dict[str, Any] | None:
    return cast(dict[str, Any], json.loads(path.read_bytes())) if path.is_file() else None


def _cut(path: Path, size: int) -> Appender:
    """The file, with what was written after the note taken off again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.truncate(size)
    return Appender(path)


def _heads(path: Path) -> Iterator[tuple[re.Match[bytes], bytes]]:
    with open(path, "rb") as file:
        for line in file:
            head = _IDS.match(line)
            assert head is not None
            yield head, line


def _counter(tokenizer: str | None, field: str) -> Count | None:
    if tokenizer is None:
        return None
    from tokenizers import Tokenizer

    path = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
    if not path.is_file():
        raise UserError(f"{path}: no such file ({field}.tokenizer)")
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer ({error}) ({field}.tokenizer)") from None
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)

"""Stage 'filter': verdicts, funnel, selection, dataset. Works alone on a run folder's problems and traces.

verdicts.jsonl is a ledger: one line a trace, each filter's verdict with its reason and a key, the hash of what it
rests on (the filter's version and settings, the problem, the trace). A verdict whose key still holds is taken from
the ledger, so that changing one threshold re-runs one filter, and neither needs the teacher.

Traces are streamed: in memory are some 100 bytes of each (where its line is, its tokens, which filters it passed),
and for the filters that compare traces a few more. First pass: all other filters, in batches over all cores; what
they say goes to a hidden file beside the ledger, from which a killed stage goes on. Then the comparing filters on
the whole columns. Last pass: the ledger, whole or not at all.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from distill.contamination import write_contamination
from distill.dataset import write_dataset
from distill.digest_columns import DigestColumns
from distill.errors import UserError
from distill.files import sha256_json, write_atomic, write_json_atomic
from distill.filter_examples import choose_examples, make_example
from distill.filters import COMPARING, filter_module
from distill.filters.comparing import Judgement, Rows
from distill.funnel import count_funnel
from distill.jsonl import read_jsonl
from distill.judging import Item, Task, batches, digest, enabled_filters, filter_bases, forget, judge, on_disk, plain
from distill.lines import Lines, StoredProblems, key
from distill.recipe import Recipe
from distill.records import FunnelRow, Problem, Trace
from distill.selection import select
from distill.traces import plan
from distill.workers import Workers, usable_cores

if TYPE_CHECKING:
    import numpy as np

    from distill.progress import Progress
    from distill.runfolder import RunFolder

_FEW_BYTES = 1 << 23  # of traces for which starting other processes takes longer than the work
_RELEASE = 1 << 16  # lines of the ledger after which memory is given back
_PARTIAL = ".verdicts.{}.partial"


def run(recipe: Recipe, run: "RunFolder", *, workers: int | None = None) -> dict[str, Any]:
    """Write verdicts.jsonl, funnel.json, filter_examples.json and dataset/; with decontamination contamination.jsonl.

    On `workers` processes, as many as there are cores if None. Raises UserError if there are no traces or none
    survives; ledger and funnel are written before that error, so that the reasons can be read.
    """
    stage = _Stage(recipe, run)
    if workers is None:
        workers = 1 if int(stage.traces.lengths[stage.chosen].sum()) < _FEW_BYTES else usable_cores()
    total = len(stage.chosen) * len(stage.enabled)
    try:
        with run.progress("filter", total, "verdicts") as progress, Workers(workers) as pool:
            stage.judge_singly(pool, progress)
            stage.judge_together(pool, progress)
    finally:
        forget()
    funnel = count_funnel(stage.passed, stage.problem, stage.tokens[:, 1])
    stage.write_ledger()
    write_json_atomic(run.path("funnel.json"), funnel)
    stage.write_contamination()
    if not stage.accepted.any():
        raise _nothing_left(run, funnel)
    selected = select(stage.stored_accepted(), recipe.selection, recipe.seed)
    facts = write_dataset(run, recipe, selected, stage.problems, funnel)
    return {
        "tokens": funnel[0]["tokens_in"],
        "accepted": int(stage.accepted.sum()),
        "judged": sum(stage.judged.values()),
        "unanswered": stage.unanswered,
        **facts,
    }


@dataclass
class _Reused:
    """Verdicts of a comparing filter that are still in an earlier ledger."""

    passed: "np.ndarray"


class StoredTrace:
    """A trace to choose and to write: read from its line when a field is asked for that is no column."""

    __slots__ = ("_row", "_stage")

    def __init__(self, stage: "_Stage", row: int) -> None:
        self._stage, self._row = stage, row

    def __getitem__(self, name: str) -> Any:
        return self._stage.field(self._row, name)


class _Stage:
    """The columns of all traces, filled from pass to pass. A row is a trace's place in the recipe's order."""

    def __init__(self, recipe: Recipe, run: "RunFolder") -> None:
        import numpy as np

        self.run = run
        self.enabled = enabled_filters(recipe.filters)
        self.single = [name for name in self.enabled if name not in COMPARING]
        self.together = [name for name in self.enabled if name in COMPARING]
        self.bases = filter_bases(self.enabled)
        self.problems = StoredProblems(run.path("problems.jsonl"))
        self.traces = Lines(run.path("traces", "traces.jsonl"), ("id", "problem_id"))
        self.chosen = _chosen(recipe, run, self.traces)
        self.problem = self.problems.lines.find("id", self.traces.keys["problem_id"][self.chosen])
        if (self.problem < 0).any():
            row = json.loads(self.traces.read(int(self.chosen[np.argmax(self.problem < 0)])))
            raise UserError(
                f"{self.traces.path}: problem {row['problem_id']} of trace {row['id']} is not in problems.jsonl"
            )
        count = len(self.chosen)
        self.passed = {name: np.zeros(count, dtype=bool) for name in self.enabled}
        self.tokens = np.zeros((count, 2), dtype=np.int64)
        self.sample = np.zeros(count, dtype=np.int64)
        self.identity = np.zeros(count, dtype=np.uint64)
        self.earlier_keys = {name: np.zeros(count, dtype=np.uint64) for name in self.together}
        self.earlier_passed = {name: np.zeros(count, dtype=bool) for name in self.together}
        self.judgements: dict[str, Judgement | _Reused] = {}
        self.keys: dict[str, str] = {}
        self.judged, self.unanswered = Counter[str](), 0
        self.digests = DigestColumns(run.folder, count)
        partial = sorted(run.folder.glob(_PARTIAL.format("*")), key=lambda path: -int(path.suffixes[-2][1:]))
        paths = [*partial, run.path("verdicts.jsonl")]
        self.ledgers = [Lines(path, ("trace_id",)) for path in paths if path.is_file()]
        self.partial = run.path(_PARTIAL.format(len(partial)))
        self.spans = np.zeros((count, 2), dtype=np.int64)  # of each row's line in the partial ledger
        found = [ledger.find("trace_id", self.traces.keys["id"][self.chosen]) for ledger in self.ledgers]
        self.ledger = np.full(count, -1, dtype=np.int8)  # which of them has the row, the newest
        self.ledger_line = np.zeros(count, dtype=np.int64)
        for number, lines in reversed(list(enumerate(found))):
            self.ledger[lines >= 0] = number
            self.ledger_line[lines >= 0] = lines[lines >= 0]

    def task(self, digests: Sequence[str]) -> Task:
        paths = tuple(ledger.path for ledger in self.ledgers)
        wanted = tuple(name for name in digests if filter_module(name).WIDTH)
        files = (self.traces.path, self.problems.lines.path, paths)
        return Task(*files, self.enabled, self.bases, wanted, self.run.path("judge"))

    def items(self) -> Iterator[Item]:
        for row in range(len(self.chosen)):
            number = int(self.ledger[row])
            earlier = self.ledgers[number].span(int(self.ledger_line[row])) if number >= 0 else (0, 0)
            problem = self.problems.lines.span(int(self.problem[row]))
            yield Item(self.traces.span(int(self.chosen[row])), problem, number, earlier)

    def judge_singly(self, pool: Workers, progress: "Progress") -> None:
        """Every filter that looks at one trace at a time; the digests for the others if nothing is known yet."""
        import numpy as np

        task = self.task(() if self.ledgers else self.together)
        self._add_digests(task)
        row = position = 0
        with open(self.partial, "wb") as file:
            for batch in pool.map(judge, task, batches(self.items(), self.enabled)):
                rows = slice(row, row + len(batch.lines))
                file.write(b"".join(batch.lines))
                file.flush()
                os.fsync(file.fileno())
                lengths = np.array([len(line) for line in batch.lines], dtype=np.int64)
                self.spans[rows, 0] = position + np.cumsum(lengths) - lengths
                self.spans[rows, 1] = lengths
                position += int(lengths.sum())
                for bit, name in enumerate(self.single):
                    self.passed[name][rows] = (batch.passed >> np.uint32(bit)) & np.uint32(1)
                self.tokens[rows], self.sample[rows], self.identity[rows] = batch.tokens, batch.sample, batch.identity
                self.digests.fill(row, batch.digests.items())
                for name in self.together:
                    self.earlier_keys[name][rows] = batch.earlier[name]
                    self.earlier_passed[name][rows] = batch.earlier_passed[name]
                self.judged.update(batch.judged)
                self.unanswered += batch.unanswered
                row = rows.stop
                progress.advance(len(batch.lines) * len(self.single))

    def judge_together(self, pool: Workers, progress: "Progress") -> None:
        """The filters that compare; each sees which traces passed all before it."""
        import numpy as np

        alive = np.ones(len(self.chosen), dtype=bool)
        for name in self.single:
            alive &= self.passed[name]
        for place, name in enumerate(self.together):
            order = np.argsort(~alive, kind="stable")
            self.keys[name] = self._set_key(name, order, alive)
            if (self.earlier_keys[name] == np.uint64(int(self.keys[name], 16))).all():
                self.passed[name] = self.earlier_passed[name]
                self.judgements[name] = _Reused(self.passed[name])
            else:
                self._digest_missing(pool, self.together[place:])
                rows = Rows(self.problem, self.sample, self.tokens[:, 0], self.digests[name], order, self._name, alive)
                judgement = filter_module(name).compare(rows, self.enabled[name])
                self.passed[name], self.judgements[name] = judgement.passed, judgement
                self.judged[name] += len(order)
            alive = alive & self.passed[name]
            self.digests.release()
            progress.advance(len(order), filter=name)
        self.accepted = alive

    def _set_key(self, name: str, order: "np.ndarray", alive: "np.ndarray") -> str:
        """What the verdicts of a comparing filter rest on: its settings, and all traces, in their order."""
        found = hashlib.sha256(self.bases[name].encode())
        found.update(self.identity[order].tobytes())
        found.update(alive[order].tobytes())
        found.update(self.problem[order].tobytes())
        return found.hexdigest()[:16]

    def _digest_missing(self, pool: Workers, names: Sequence[str]) -> None:
        """Read the traces once more for the digests that the first pass did not make."""
        task = self.task([name for name in names if name not in self.digests])
        if not task.digests:
            return
        self._add_digests(task)
        row = 0
        for found in pool.map(digest, task, batches(self.items())):
            self.digests.fill(row, found.items())
            row += len(next(iter(found.values())))

    def _add_digests(self, task: Task) -> None:
        self.digests.add({name: filter_module(name).WIDTH for name in task.digests})

    def _name(self, row: int) -> str:
        return self.traces.value(int(self.chosen[row]), "id")

    def stored_accepted(self) -> Iterator[Trace]:
        import numpy as np

        for row in np.flatnonzero(self.accepted).tolist():
            yield cast(Trace, StoredTrace(self, row))

    def field(self, row: int, name: str) -> Any:
        """A field of a trace: those it is chosen by from the columns, the others from its line."""
        if name == "problem_id":
            return self.problems.lines.value(int(self.problem[row]), "id")
        if name == "sample":
            return int(self.sample[row])
        if name == "reasoning_tokens":
            return int(self.tokens[row, 0])
        if name == "answer_tokens":
            return int(self.tokens[row, 1] - self.tokens[row, 0])
        if name == "id":
            return self._name(row)
        return self.traces.parsed(int(self.chosen[row]))[name]

    def write_ledger(self) -> None:
        """verdicts.jsonl, each line the partial one with the comparing filters' verdicts, and a few examples."""
        wanted = choose_examples(self.passed, self.accepted, self.identity)
        examples: dict[str, dict[str, list[dict[str, Any]]]] = {
            name: {"rejected": [], "accepted": []} for name in self.enabled
        }

        def lines() -> Iterator[bytes]:
            settings = sha256_json({name: plain(section) for name, section in self.enabled.items()})[:12]
            ends = {
                accepted: f', "accepted": {json.dumps(accepted)}, "settings": "{settings}"}}\n'.encode()
                for accepted in (True, False)
            }
            with open(self.partial, "rb") as file:
                for row, line in enumerate(file):
                    assert line.endswith(b"}}\n")
                    said = b"".join(b", " + self._comparing(name, row) for name in self.together)
                    line = line[:-3] + said + b"}" + ends[bool(self.accepted[row])]
                    if not row % _RELEASE:
                        self.digests.release()
                    for name, verdict in wanted.get(row, ()):
                        trace = json.loads(self.traces.read(int(self.chosen[row])))
                        problem = self.problems.at(int(self.problem[row]))
                        examples[name][verdict].append(make_example(json.loads(line), name, trace, problem))
                    yield line

        write_atomic(self.run.path("verdicts.jsonl"), lines())
        write_json_atomic(self.run.path("filter_examples.json"), examples)
        for path in self.run.folder.glob(_PARTIAL.format("*")):
            path.unlink()

    def _comparing(self, name: str, row: int) -> bytes:
        judgement = self.judgements[name]
        if isinstance(judgement, _Reused):
            earlier = json.loads(self.ledgers[int(self.ledger[row])].read(int(self.ledger_line[row])))
            return _fragment(name, json.dumps(earlier["verdicts"][name], ensure_ascii=False))
        verdict = judgement.verdict(row)
        if verdict.measured is None:
            return _plain_fragment(name, verdict.passed, verdict.reason, self.keys[name])
        return _fragment(name, json.dumps(on_disk(verdict, self.keys[name]), ensure_ascii=False))

    def write_contamination(self) -> None:
        import numpy as np

        settings = self.enabled.get("decontamination")
        dropped = ~self.passed["decontamination"] if settings is not None else np.zeros(len(self.chosen), dtype=bool)
        hit = np.unique(self.problem[dropped]).tolist()
        write_contamination(self.run, settings, self.problems, hit, len(np.unique(self.problem)))


def _fragment(name: str, verdict: str) -> bytes:
    return f'"{name}": {verdict}'.encode("utf-8", "backslashreplace")


@lru_cache(maxsize=1024)
def _plain_fragment(name: str, passed: bool, reason: str, key: str) -> bytes:
    """Most traces are told the same."""
    return _fragment(name, json.dumps({"pass": passed, "reason": reason, "key": key}, ensure_ascii=False))


def _chosen(recipe: Recipe, run: "RunFolder", traces: Lines) -> "np.ndarray":
    """The lines of traces.jsonl that this recipe asked for, in the plan's order; without a teacher on record, all."""
    import numpy as np

    teacher = run.manifest.data.get("teacher")
    if teacher is None:
        _, firsts = np.unique(traces.keys["id"], return_index=True)
        chosen = np.sort(firsts)
    else:
        asked = (cast(Problem, row) for _, row in read_jsonl(run.path("problems.jsonl")))
        ids = (key(ask.id) for _, _, ask in plan(recipe, asked, teacher["id"]))
        parts = [np.empty(0, dtype=np.int64)]
        while part := list(islice(ids, 1 << 16)):
            parts.append(traces.find("id", np.array(part, dtype=np.int64)))
        chosen = np.concatenate(parts)
        chosen = chosen[chosen >= 0]
    if not len(chosen):
        raise UserError(f"{traces.path}: holds no trace of this recipe's problems, teacher and sampling settings")
    return chosen


def _nothing_left(run: "RunFolder", funnel: Sequence[FunnelRow]) -> UserError:
    worst = max(funnel, key=lambda row: row["in"] - row["out"])
    name = worst["filter"]
    path: Path = run.path("verdicts.jsonl")
    verdicts = (row["verdicts"][name] for _, row in read_jsonl(path))
    reasons = Counter(said["reason"] for said in verdicts if not said["pass"])
    return UserError(
        f"none of the {funnel[0]['in']} traces passed the filters: '{name}' dropped the most, "
        f"{worst['in'] - worst['out']} of {worst['in']} (mostly: {reasons.most_common(1)[0][0]}); all reasons are in "
        f"{path}; no dataset was written"
    )

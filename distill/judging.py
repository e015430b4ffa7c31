"""The filters' work on a batch of traces, in this process or another: read the lines, judge, write the ledger's lines.

Everything that a verdict rests on is in its key: the filter with its version and settings, the problem, the trace's
line. A verdict whose key still holds is taken from the earlier ledger.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from distill.files import sha256_json
from distill.filters import ASKING, COMPARING, ORDER, PAID, filter_module
from distill.jsonl import encode_row
from distill.lines import Span
from distill.recipe import Filters
from distill.records import FilterVerdict, Problem, Trace, Verdict

if TYPE_CHECKING:
    import numpy as np

Settings = Any  # a section of recipe.Filters, or None for truncation, which has no settings
BATCH_BYTES = 1 << 21  # of trace lines that are judged together
BATCH_ROWS = 512
ASKED_ROWS = 64
# Where and how fast a judge answers decides no verdict.
_UNDECISIVE = {"judge": {"base_url", "seconds", "at_once"}}
NOT_ASKED = Verdict(True, "not asked: a filter before rejected it", settled=False)


@dataclass(frozen=True)
class Task:
    """What all batches have in common; travels to each worker once."""

    traces: Path
    problems: Path
    ledgers: tuple[Path, ...]  # files with earlier verdicts
    enabled: dict[str, Settings]
    bases: dict[str, str]  # of each filter, the part of its keys that does not depend on the trace
    digests: tuple[str, ...]  # comparing filters whose digests are wanted
    replies: Path  # folder for what models said


class Item(NamedTuple):
    """One trace to judge: where its line is, its problem's, and what was said of it before."""

    trace: Span
    problem: Span
    ledger: int  # which of the task's ledgers, or -1
    earlier: Span


@dataclass
class Batch:
    """What came of a batch. Arrays have one row a trace."""

    lines: list[bytes]  # for the ledger, without the comparing filters' verdicts
    passed: "np.ndarray"  # uint32: bit i for the i-th filter that judges single traces
    tokens: "np.ndarray"  # int64, shape (traces, 2): reasoning, all that was generated
    sample: "np.ndarray"  # int64
    identity: "np.ndarray"  # uint64: a hash of id and content, the same in every process
    digests: "dict[str, np.ndarray]"
    earlier: "dict[str, np.ndarray]"  # of comparing filters: the key that the earlier verdict rests on, or 0
    earlier_passed: "dict[str, np.ndarray]"  # bool
    judged: dict[str, int] = field(default_factory=dict)  # how many verdicts are new, by filter
    unanswered: int = 0  # verdicts that a model owes


def enabled_filters(filters: Filters) -> dict[str, Settings]:
    """The filters that the recipe switches on, with their settings, in the order of the funnel."""
    settings = {"truncation": None} | {name: getattr(filters, name) for name in ORDER if name != "truncation"}
    return {name: settings[name] for name in ORDER if name == "truncation" or settings[name] is not None}


def filter_bases(enabled: Mapping[str, Settings]) -> dict[str, str]:
    """Of each filter, a hash of its version, settings and what else it rests on."""
    found = {}
    for name, settings in enabled.items():
        module = filter_module(name)
        rest = module.rests_on(settings) if hasattr(module, "rests_on") else []
        decisive = None if settings is None else settings.model_dump(mode="json", exclude=_UNDECISIVE)
        found[name] = sha256_json([name, module.VERSION, decisive, rest])[:8]
    return found


def plain(settings: Settings) -> dict[str, Any] | None:
    return None if settings is None else settings.model_dump(mode="json")


def judge(task: Task, items: Sequence[Item]) -> Batch:
    """The verdicts of every filter that judges single traces, and the digests for those that compare."""
    import numpy as np

    lines = [_read(task.traces, item.trace) for item in items]
    traces = [cast(Trace, json.loads(line)) for line in lines]
    problems: dict[str, Problem] = {}
    problem_keys = []
    for item, trace in zip(items, traces, strict=True):
        problem, problem_key = _problem(task.problems, item.problem)
        problems[trace["problem_id"]] = problem
        problem_keys.append(problem_key)
    contents = [zlib.crc32(line) for line in lines]
    del lines
    rests = [f"{problem_key}{content:08x}" for problem_key, content in zip(problem_keys, contents, strict=True)]
    earlier = [_earlier(task, item) for item in items]
    verdicts: list[dict[str, FilterVerdict]] = [{} for _ in items]
    passed = np.zeros(len(items), dtype=np.uint32)
    judged: dict[str, int] = {}
    unanswered = 0
    single = [name for name in task.enabled if name not in COMPARING]
    together = [name for name in task.enabled if name in COMPARING]
    for bit, name in enumerate(single):
        keys = [task.bases[name] + rest for rest in rests]
        todo = []
        for row, (known, key) in enumerate(zip(earlier, keys, strict=True)):
            if name in known and known[name]["key"] == key:
                verdicts[row][name] = known[name]
            else:
                todo.append(row)
        if name in PAID:
            for row in [row for row in todo if int(passed[row]) != (1 << bit) - 1]:
                verdicts[row][name] = on_disk(NOT_ASKED, "")
                todo.remove(row)
        more = (task.replies,) if name in ASKING else ()
        asked = [traces[row] for row in todo]
        found = filter_module(name).check(asked, problems, task.enabled[name], *more) if todo else []
        for row, verdict in zip(todo, found, strict=True):
            verdicts[row][name] = on_disk(verdict, keys[row] if verdict.settled else "")
            unanswered += not verdict.settled
        judged[name] = len(todo)
        passed |= np.array([said[name]["pass"] for said in verdicts], dtype=np.uint32) << np.uint32(bit)
    return Batch(
        lines=[_line(trace, said) for trace, said in zip(traces, verdicts, strict=True)],
        passed=passed,
        tokens=np.array(
            [(t["reasoning_tokens"], t["reasoning_tokens"] + t["answer_tokens"]) for t in traces], dtype=np.int64
        ).reshape(len(traces), 2),
        sample=np.array([trace["sample"] for trace in traces], dtype=np.int64),
        identity=np.array(
            [_identity(t["id"]) ^ c << 16 for t, c in zip(traces, contents, strict=True)], dtype=np.uint64
        ),
        digests={name: filter_module(name).digest(traces, problems, task.enabled[name]) for name in task.digests},
        earlier={
            name: np.array([int(known[name]["key"][:16], 16) if name in known else 0 for known in earlier], np.uint64)
            for name in together
        },
        earlier_passed={
            name: np.array([name in known and known[name]["pass"] for known in earlier], dtype=bool)
            for name in together
        },
        judged=judged,
        unanswered=unanswered,
    )


def digest(task: Task, items: Sequence[Item]) -> "dict[str, np.ndarray]":
    """The digests alone, where the verdicts are known already."""
    traces = [cast(Trace, json.loads(_read(task.traces, item.trace))) for item in items]
    problems = {
        trace["problem_id"]: _problem(task.problems, item.problem)[0] for item, trace in zip(items, traces, strict=True)
    }
    return {name: filter_module(name).digest(traces, problems, task.enabled[name]) for name in task.digests}


def on_disk(verdict: Verdict, key: str) -> FilterVerdict:
    said: FilterVerdict = {"pass": verdict.passed, "reason": verdict.reason, "key": key}
    if verdict.measured is not None:
        said["measured"] = verdict.measured
    return said


def _line(trace: Trace, verdicts: dict[str, FilterVerdict]) -> bytes:
    row = {"trace_id": trace["id"], "problem_id": trace["problem_id"], "sample": trace["sample"], "verdicts": verdicts}
    return encode_row(row)


def _identity(trace_id: str) -> int:
    return int.from_bytes(blake2b(trace_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _earlier(task: Task, item: Item) -> dict[str, FilterVerdict]:
    if item.ledger < 0:
        return {}
    return cast(dict[str, FilterVerdict], json.loads(_read(task.ledgers[item.ledger], item.earlier))["verdicts"])


_handles: dict[Path, int] = {}  # of the task's files, open until forget()


def _read(path: Path, span: Span) -> bytes:
    if path not in _handles:
        _handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return os.pread(_handles[path], span[1], span[0])


@lru_cache(maxsize=4096)
def _problem(path: Path, span: Span) -> tuple[Problem, str]:
    """The problem, and a hash of what filters look at in it."""
    problem = cast(Problem, json.loads(_read(path, span)))
    text = json.dumps([problem["kind"], problem["answer"], problem["problem"]])  # ASCII, whatever is in it
    return problem, blake2b(text.encode(), digest_size=4).hexdigest()


def forget() -> None:
    """Close the files: another task's may have the same names."""
    while _handles:
        os.close(_handles.popitem()[1])
    _problem.cache_clear()


def batches(items: Iterable[Item], enabled: Mapping[str, Settings] | None = None) -> Iterator[list[Item]]:
    """Items in portions that a worker takes at once; smaller ones where a filter asks a model, to show progress."""
    asking = any(getattr(settings, "judge", None) for settings in (enabled or {}).values())
    rows = ASKED_ROWS if asking else BATCH_ROWS
    portion: list[Item] = []
    size = 0
    for item in items:
        portion.append(item)
        size += item.trace[1]
        if size >= BATCH_BYTES or len(portion) >= rows:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion

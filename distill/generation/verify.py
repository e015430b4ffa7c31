"""Which samples are right, found out while generation goes on, as the recipe's `filters.correctness` means it.

Grades are kept in traces/grades.jsonl, so that a resume does not grade again: a line holds the trace's id and a key,
the hash of that and of all that the grade rests on, so an edited answer or another setting asks for other keys.
"""

import hashlib
import queue
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, get_args

from distill.errors import UserError
from distill.generation.lines import encode, parse
from distill.generation.plan import canonical
from distill.jsonl import Appender
from distill.records import Problem, Trace

if TYPE_CHECKING:
    import numpy as np

    from distill.recipe import Recipe

_THREADS = 4  # they wait for grading processes; what is decided here takes microseconds
_TOGETHER = 32  # traces graded by one thread at a time
_MOST_WAITING = 2048  # several times what an fsync brings at once: below that, generation would stop for the graders
_Graded = Literal["id", "problem_id", "response", "finish_reason"]  # of a trace; the rest, which is long, is not held
_GRADED: tuple[_Graded, ...] = get_args(_Graded)


class Grade(NamedTuple):
    problem: int  # its index
    trace_id: str
    key: int
    right: bool
    settled: bool  # whether asking again would bring the same; a judge may have been away


class Verifier:
    """Grades in threads of its own. `results` and everything else is for the stage's thread.

    Raises UserError where the recipe has no `filters.correctness`.
    """

    def __init__(self, recipe: "Recipe", grades: Path, judge_replies: Path) -> None:
        from distill.judging import filter_bases

        settings = recipe.filters.correctness
        if settings is None:
            raise UserError("sampling.adaptive needs `filters.correctness`, which says when a sample is right")
        self._settings, self._judge_replies = settings, judge_replies
        self._base = filter_bases({"correctness": settings})["correctness"]
        self._file = Appender(grades)
        self._known = _read(grades)
        self._threads = ThreadPoolExecutor(_THREADS, "verify")
        self._graded: queue.SimpleQueue[list[Grade] | BaseException] = queue.SimpleQueue()
        self._waiting = 0

    def check(self, problem: Problem, place: str) -> None:
        """Raise UserError for a problem of which no sample can ever be found right."""
        if problem["answer"] is None:
            gradable = self._settings.without_reference != "reject" or (
                problem["kind"] == "judge" and self._settings.judge is not None
            )
            lacks = "has no reference answer"
        else:
            gradable = problem["kind"] not in ("open", "judge") or self._settings.judge is not None
            lacks = f"is of kind '{problem['kind']}', which needs `filters.correctness.judge`"
        if not gradable:
            raise UserError(
                f"{place}: problem {problem['id']} {lacks}, so `sampling.adaptive` could not tell when it is solved"
            )

    def known(self, problem: Problem, ids: Sequence[int]) -> list[bool | None]:
        """Earlier grades of these samples; None where there is none."""
        import numpy as np

        keys = np.array([self._key(problem, identity) for identity in ids], dtype=np.uint64)
        right, wrong = (np.isin(keys, graded) for graded in self._known)
        return [bool(r) if r or w else None for r, w in zip(right, wrong, strict=True)]

    @property
    def has_room(self) -> bool:
        """Whether more should be submitted now: what waits is held in memory."""
        return self._waiting < _MOST_WAITING

    @property
    def waiting(self) -> int:
        """How many are submitted and not in any `results` yet."""
        return self._waiting

    def submit(self, items: Sequence[tuple[int, Problem, Trace]]) -> None:
        """Grade these (the problem's index, the problem, the trace), in whatever order."""
        self._waiting += len(items)
        short = [
            (place, problem, cast(Trace, {name: trace[name] for name in _GRADED})) for place, problem, trace in items
        ]
        for first in range(0, len(short), _TOGETHER):
            self._threads.submit(self._grade, short[first : first + _TOGETHER])

    def results(self) -> list[Grade]:
        """What was graded since the last call, written down. Raises what grading raised: a judge that is not there."""
        found: list[Grade] = []
        while not self._graded.empty():
            part = self._graded.get_nowait()
            if isinstance(part, BaseException):
                raise part
            found += part
        self._waiting -= len(found)
        rows = [
            {"id": grade.trace_id, "key": f"{grade.key:016x}", "right": grade.right} for grade in found if grade.settled
        ]
        if rows:
            self._file.append_lines(map(encode, rows))  # not synced: lost with the power, it is graded again
        return found

    def _grade(self, items: Sequence[tuple[int, Problem, Trace]]) -> None:
        from distill.filters.correctness import check

        try:
            problems = {problem["id"]: problem for _, problem, _ in items}
            verdicts = check([trace for *_, trace in items], problems, self._settings, self._judge_replies)
            self._graded.put(
                [
                    Grade(index, trace["id"], self._key(problem, int(trace["id"], 16)), verdict.passed, verdict.settled)
                    for (index, problem, trace), verdict in zip(items, verdicts, strict=True)
                ]
            )
        except BaseException as error:
            self._graded.put(error)

    def _key(self, problem: Problem, identity: int) -> int:
        rests_on = f"{self._base}/{identity:016x}/{problem['kind']}/{canonical(problem['answer'])}"
        return int.from_bytes(hashlib.blake2b(rests_on.encode("utf-8", "surrogatepass"), digest_size=8).digest())

    def close(self) -> None:
        """Give up what is not graded yet."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._file.close()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read(path: Path) -> "tuple[np.ndarray, np.ndarray]":
    """Keys of the right ones and of the others, 8 bytes each."""
    import numpy as np

    right, wrong = array("Q"), array("Q")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            row = parse(line, f"{path}:{number}")
            (right if row["right"] else wrong).append(int(row["key"], 16))
    return np.array(right, dtype=np.uint64), np.array(wrong, dtype=np.uint64)

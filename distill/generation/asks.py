"""What a teacher is asked, one sample at a time: the plan minus what is finished, drawn when the teacher has room.

Problems are begun in the plan's order; what a begun problem still needs comes before the next problem. With adaptive
sampling that is what keeps the end short: a hard problem's waves wait for each other, so the sooner each begins, the
less there is to wait for when no other work is left.
"""

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from distill.generation.accounts import error_kind
from distill.generation.budget import Spending
from distill.generation.finished import Finished
from distill.generation.plan import Planner
from distill.generation.survey import ProblemFile, Survey, stand, wave
from distill.generation.verify import Verifier
from distill.records import Ask, Problem, Reply, Trace


class ListedAsks:
    """Asks that are known from the start; see records.Asks."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._waiting = deque(asks)

    def take(self, most: int) -> list[Ask]:
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    @property
    def closed(self) -> bool:
        return not self._waiting


class Flight(NamedTuple):
    """A sample that the teacher has been asked for."""

    place: int  # of the problem
    problem: Problem
    sample: int
    ask: Ask


@dataclass(slots=True)
class _Begun:
    """A problem of which adaptive sampling may yet want more."""

    problem: Problem
    wanted: int
    right: int
    waiting: int  # samples that are to be asked for, in flight or being graded
    failed: bool = False


class PlannedAsks:
    """See records.Asks: `take` and `closed` are the teacher's, from whatever thread; the rest is the stage's.

    `wanted` and `done` count samples; wanted changes while adaptive sampling goes on.
    """

    def __init__(
        self, problems: ProblemFile, planner: Planner, finished: Finished, found: Survey, spending: Spending,
        verifier: Verifier | None,
    ) -> None:  # fmt: skip
        self._problems, self._planner, self._finished, self._spending = problems, planner, finished, spending
        self._verifier = verifier
        self._open, self._next = found.open, 0
        self._ready: deque[tuple[int, Problem, int, int]] = deque()  # index, problem, sample, id
        self._flights: dict[str, Flight] = {}
        self._begun: dict[int, _Begun] = {}
        self._lock = threading.RLock()
        self.wanted, self.done = found.wanted, found.done
        self.failed = 0
        self._errors: Counter[str] = Counter()
        self._said: dict[str, str] = {}  # of each kind of error, the first
        self.drained = self.out_of_budget = False

    # The teacher's

    def take(self, most: int) -> list[Ask]:
        with self._lock:
            asks: list[Ask] = []
            if self.drained:
                return asks
            most = self._spending.room(len(self._flights), most)
            while len(asks) < most and (self._ready or self._begin_next()):
                if not self._ready:
                    continue
                index, problem, sample, identity = self._ready.popleft()
                if index in self._begun and self._is_solved(self._begun[index]):
                    self.wanted -= 1
                    self._one_less(index)
                    continue
                ask = self._planner.ask(problem, sample, identity)
                if not self._spending.admit(ask):
                    self._ready.appendleft((index, problem, sample, identity))
                    break
                self._flights[ask.id] = Flight(index, problem, sample, ask)
                asks.append(ask)
            return asks

    @property
    def closed(self) -> bool:
        with self._lock:
            if self.drained or not (self._ready or self._begun or self._next < len(self._open)):
                return True
            if not self._flights and not self._spending.room(0, 1):
                self.out_of_budget = True
            return self.out_of_budget

    # The stage's

    def drain(self) -> None:
        """Ask for nothing more. Takes no lock: it is called by signal handlers."""
        self.drained = True

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def received(self, replies: Sequence[Reply]) -> list[Flight]:
        """What each of these was the answer to. The teacher is done with it; see `finished` and `gave_up`."""
        with self._lock:
            flights = []
            for reply in replies:
                flight = self._flights.pop(reply.id, None)
                assert flight is not None, f"the teacher answered {reply.id} twice, or was not asked"
                self._spending.add(reply)
                flights.append(flight)
            return flights

    def gave_up(self, flight: Flight, error: str | None) -> None:
        """A sample failed; it is left for the next start, and so is what its problem may need after it."""
        with self._lock:
            self.failed += 1
            kind = error_kind(error)
            self._errors[kind] += 1
            self._said.setdefault(kind, (error or kind)[:200])
            if flight.place in self._begun:
                self._begun[flight.place].failed = True
                self._one_less(flight.place)

    @property
    def usual_error(self) -> str:
        """What was said of a sample that failed for the commonest reason."""
        return self._said[self._errors.most_common(1)[0][0]]

    def finished(self, traces: Sequence[tuple[Flight, Trace]]) -> None:
        """These are on the disk."""
        with self._lock:
            self.done += len(traces)
            if self._verifier is not None:
                self._verifier.submit([(flight.place, flight.problem, trace) for flight, trace in traces])

    def poll(self) -> tuple[int, int]:
        """Go on from the grades that have come. Returns how many were right, and how many were not."""
        if self._verifier is None:
            return 0, 0
        with self._lock:
            grades = self._verifier.results()
            for grade in grades:
                self._begun[grade.problem].right += grade.right
            for grade in grades:
                self._one_less(grade.problem)
            right = sum(grade.right for grade in grades)
            return right, len(grades) - right

    @property
    def grading(self) -> bool:
        """Whether grades are still to come."""
        return self._verifier is not None and self._verifier.waiting > 0

    def _begin_next(self) -> bool:
        """Take up the next problem; False if there is none, or the graders have more than enough to do."""
        if self._next >= len(self._open) or (self._verifier is not None and not self._verifier.has_room):
            return False
        index = self._open[self._next]
        self._next += 1
        problem = self._problems[index]
        standing = stand(problem, self._planner, self._finished, self._verifier)
        self._ready.extend((index, problem, sample, standing.ids[sample]) for sample in standing.missing)
        waiting = len(standing.missing) + len(standing.ungraded)
        if self._verifier is not None and waiting:
            self._begun[index] = _Begun(problem, standing.wanted, standing.right, waiting)
            self._grade_stored(index, problem, [standing.ids[sample] for sample in standing.ungraded])
        return True

    def _is_solved(self, begun: _Begun) -> bool:
        adaptive = self._planner.settings.adaptive
        return adaptive is not None and begun.right >= adaptive.verified

    def _one_less(self, index: int) -> None:
        """A sample of a begun problem is settled; after the last of a wave comes the next wave, or the end."""
        begun = self._begun[index]
        begun.waiting -= 1
        while not begun.waiting:
            if begun.failed or self._is_solved(begun) or begun.wanted >= self._planner.most:
                del self._begun[index]
                return
            self._next_wave(index, begun)

    def _next_wave(self, index: int, begun: _Begun) -> None:
        adaptive, verifier = self._planner.settings.adaptive, self._verifier
        assert adaptive is not None and verifier is not None
        first = begun.wanted
        begun.wanted += wave(first, begun.right, adaptive.verified, self._planner.most)
        ids = self._planner.ids(begun.problem, first, begun.wanted)
        grades = verifier.known(begun.problem, ids)
        there = self._finished.having(ids)  # an earlier recipe may have asked for them
        missing = [n for n, is_there in enumerate(there) if not is_there]
        ungraded = [n for n, is_there in enumerate(there) if is_there and grades[n] is None]
        begun.right += sum(bool(grade) for grade, is_there in zip(grades, there, strict=True) if is_there)
        begun.waiting = len(missing) + len(ungraded)
        self.wanted += len(ids)
        self.done += len(ids) - len(missing)
        self._ready.extendleft((index, begun.problem, first + n, ids[n]) for n in reversed(missing))
        self._grade_stored(index, begun.problem, [ids[n] for n in ungraded])

    def _grade_stored(self, index: int, problem: Problem, ids: Sequence[int]) -> None:
        if self._verifier is not None and ids:
            traces = [cast(Trace, self._finished.read(identity)) for identity in ids]
            self._verifier.submit([(index, problem, trace) for trace in traces])

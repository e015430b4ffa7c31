"""What the filters that compare traces share: a trace as a few bytes, and all of them as columns.

Such a filter has two halves instead of one. `digest(traces, problems, settings)` makes WIDTH bytes of each trace; it
looks at one trace at a time, so it runs in the workers, beside the filters that need no comparison. `compare(rows,
settings)` sees these bytes of all traces at once, in the parent, a million of them in a few hundred megabytes. What it
judges depends on which traces there are and which of them passed so far: those come first in `order`, so that a
rejected trace never stands in the way of an accepted one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distill.records import Problem, Trace, Verdict

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Rows:
    """All traces, by number. Arrays have shape (traces,), the payload (traces, WIDTH)."""

    problem: "np.ndarray"  # int64: equal for traces of the same problem
    sample: "np.ndarray"  # int64
    tokens: "np.ndarray"  # int64: of the reasoning
    payload: "np.ndarray"  # uint8: what `digest` made
    order: "np.ndarray"  # int64: the traces' numbers, those that passed every filter before first
    name: Callable[[int], str]  # a trace's id
    passed: "np.ndarray"  # bool: every filter before


@dataclass(frozen=True)
class Judgement:
    """Verdicts on all traces, their reasons made when asked for."""

    passed: "np.ndarray"  # bool, shape (traces,)
    reason: Callable[[int], str]
    measured: Callable[[int], dict[str, float] | None] = lambda row: None

    def verdict(self, row: int) -> Verdict:
        return Verdict(bool(self.passed[row]), self.reason(row), self.measured(row))


def check_all(
    module: ModuleType | Any, traces: Sequence[Trace], problems: dict[str, Problem], settings: Any
) -> list[Verdict]:
    """A comparing filter's `check`: both halves on a handful of traces, all taken as passed so far."""
    import numpy as np

    numbers: dict[str, int] = {}
    rows = Rows(
        problem=np.array([numbers.setdefault(t["problem_id"], len(numbers)) for t in traces], dtype=np.int64),
        sample=np.array([t["sample"] for t in traces], dtype=np.int64),
        tokens=np.array([t["reasoning_tokens"] for t in traces], dtype=np.int64),
        payload=module.digest(list(traces), problems, settings),
        order=np.arange(len(traces)),
        name=lambda row: traces[row]["id"],
        passed=np.ones(len(traces), dtype=bool),
    )
    judgement = module.compare(rows, settings)
    return [judgement.verdict(row) for row in range(len(traces))]


def by_problem(rows: Rows, chosen: "np.ndarray") -> "list[np.ndarray]":
    """The chosen traces' numbers, grouped by problem."""
    import numpy as np

    if not len(chosen):
        return []
    chosen = chosen[np.argsort(rows.problem[chosen], kind="stable")]
    return np.split(chosen, np.flatnonzero(np.diff(rows.problem[chosen])) + 1)


def no_digest(traces: list[Trace], problems: dict[str, Problem], settings: Any) -> "np.ndarray":
    """Of filters that need no more than the columns."""
    import numpy as np

    return np.zeros((len(traces), 0), dtype=np.uint8)

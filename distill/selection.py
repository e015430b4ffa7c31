"""Which of the accepted traces are learnt from, and which problems are kept for validation.

Deterministic: the same traces, settings and seed give the same choice on every machine, and another problem
added or removed leaves the choice for the others as it is.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from distill.recipe import Selection
from distill.records import Trace


def select(accepted: Iterable[Trace], settings: Selection, seed: int) -> list[Trace]:
    """Up to `per_problem` traces of each problem, problems in the order of their first trace.

    'shortest' prefers fewer generated tokens (then the lower sample index), since among correct solutions
    of one problem the extra tokens are mostly detours.
    """
    by_problem: dict[str, list[Trace]] = {}
    for trace in accepted:
        by_problem.setdefault(trace["problem_id"], []).append(trace)

    def order(trace: Trace) -> Any:
        if settings.choose == "random":
            return _rank(seed, "trace", trace["id"])
        return trace["reasoning_tokens"] + trace["answer_tokens"], trace["sample"]

    return [trace for traces in by_problem.values() for trace in sorted(traces, key=order)[: settings.per_problem]]


def validation_problems(problem_ids: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The problems set aside: about `fraction` of them, at least one if there are two, never all.

    Split by problem and not by trace, or validation would hold other solutions of training problems.
    """
    distinct = sorted(set(problem_ids), key=lambda identity: _rank(seed, "validation", identity))
    if fraction <= 0 or len(distinct) < 2:
        return set()
    return set(distinct[: min(max(1, round(fraction * len(distinct))), len(distinct) - 1)])


def _rank(seed: int, purpose: str, identity: str) -> str:
    return hashlib.sha256(f"{seed}/{purpose}/{identity}".encode()).hexdigest()

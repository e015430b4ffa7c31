"""Which of a problem's accepted traces are learnt from, and which problems are kept for validation.

Deterministic: the same traces, settings and seed give the same choice on every machine, and another problem
added or removed leaves the choice for the others as it is.
"""

import hashlib
import heapq
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from distill.recipe import Selection
from distill.records import Trace

if TYPE_CHECKING:
    import numpy as np

_COMPARED = 64  # most traces of a problem that 'diverse' compares
_WORDS = 4  # of the stretches by which it does


def select(accepted: Iterable[Trace], settings: Selection, seed: int) -> list[Trace]:
    """Up to `per_problem` traces of each problem, problems in the order of their first trace.

    'shortest' prefers fewer generated tokens (then the lower sample index), since among correct solutions of one
    problem the extra tokens are mostly detours; 'median' those nearest to the problem's median; 'diverse' begins with
    the shortest and goes on with the one least like those taken. Of a trace that is not taken only numbers are kept
    (and 'diverse' reads texts one problem at a time).
    """
    import numpy as np

    traces = list(accepted)
    problem, tokens, sample = array("q"), array("q"), array("q")
    for trace in traces:
        problem.append(hash(trace["problem_id"]))
        tokens.append(trace["reasoning_tokens"] + trace["answer_tokens"])
        sample.append(trace["sample"])
    group = _numbered(np.array(problem, dtype=np.int64))
    lengths, samples = np.array(tokens, dtype=np.int64), np.array(sample, dtype=np.int64)
    if settings.choose == "random":
        ranks = [int(_rank(seed, "trace", trace["id"])[:16], 16) for trace in traces]
        order = np.lexsort((np.array(ranks, dtype=np.uint64), group))
    elif settings.choose == "median":
        order = np.lexsort((samples, lengths, _from_median(group, lengths), group))
    else:
        order = np.lexsort((samples, lengths, group))
    sorted_groups = group[order]
    begins = np.searchsorted(sorted_groups, sorted_groups)
    place = np.arange(len(order)) - begins
    if settings.choose == "diverse" and settings.per_problem > 1:
        return _diverse(traces, order, place, settings.per_problem)
    return [traces[row] for row in order[place < settings.per_problem].tolist()]


def _numbered(keys: "np.ndarray") -> "np.ndarray":
    """0 for all that equal the first, 1 for the next other one, and so on."""
    import numpy as np

    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), dtype=np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    return numbers[inverse]


def _from_median(group: "np.ndarray", lengths: "np.ndarray") -> "np.ndarray":
    """Twice the distance of each length from the median of its group, which keeps it a whole number."""
    import numpy as np

    order = np.lexsort((lengths, group))
    begin = np.searchsorted(group[order], np.arange(group.max(initial=-1) + 1))
    count = np.bincount(group, minlength=len(begin))
    low, high = lengths[order[begin + (count - 1) // 2]], lengths[order[begin + count // 2]]
    return np.abs(2 * lengths - (low + high)[group])


def _diverse(traces: Sequence[Trace], order: "np.ndarray", place: "np.ndarray", most: int) -> list[Trace]:
    chosen: list[Trace] = []
    own: list[Trace] = []
    for row, number in zip(order.tolist(), place.tolist(), strict=True):
        if number == 0:
            chosen += _spread(own, most)
            own = []
        if number < max(_COMPARED, most):
            own.append(traces[row])
    return chosen + _spread(own, most)


def _spread(own: list[Trace], most: int) -> list[Trace]:
    """The first of `own`, then again and again the one whose nearest among those taken is the farthest (Jaccard)."""
    if len(own) <= most:
        return own
    stretches = [_stretches(trace) for trace in own]
    taken, nearest = [0], [0.0] * len(own)  # likeness to the nearest that is taken
    while len(taken) < most:
        for row, found in enumerate(stretches):
            last = stretches[taken[-1]]
            nearest[row] = max(nearest[row], len(found & last) / max(1, len(found | last)))
        taken.append(min((row for row in range(len(own)) if row not in taken), key=nearest.__getitem__))
    return [own[row] for row in taken]


def _stretches(trace: Trace) -> set[int]:
    words = trace["reasoning"].split()
    # Not hash(): that differs from process to process.
    found = (" ".join(words[begin : begin + _WORDS]) for begin in range(max(1, len(words) - _WORDS + 1)))
    return {
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) for text in found
    }


def validation_problems(problem_ids: Iterable[str], fraction: float, seed: int) -> set[str]:
    """The problems set aside: about `fraction` of them, at least one if there are two, never all.

    Split by problem and not by trace, or validation would hold other solutions of training problems.
    """
    distinct = set(problem_ids)
    if fraction <= 0 or len(distinct) < 2:
        return set()
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    return set(heapq.nsmallest(count, distinct, key=lambda identity: _rank(seed, "validation", identity)))


def _rank(seed: int, purpose: str, identity: str) -> str:
    return hashlib.sha256(f"{seed}/{purpose}/{identity}".encode()).hexdigest()

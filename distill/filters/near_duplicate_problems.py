"""near_duplicate_problems: of problems that say nearly the same, one is enough.

Two problems are one if their texts' stretches of `ngram` words are the same to `similarity`; numbers count, so that
two drills with other numbers are two problems. The traces of all but one problem are rejected: kept is the first,
in the recipe's order, of those with a trace that passed so far.
"""

import sys
from typing import TYPE_CHECKING

from distill.filters import minhash
from distill.filters.comparing import Judgement, Rows, check_all
from distill.filters.words import words_of
from distill.recipe import NearDuplicateProblems
from distill.records import Problem, Trace, Verdict

if TYPE_CHECKING:
    import numpy as np

VERSION = 1
WIDTH = minhash.WIDTH


def check(traces: list[Trace], problems: dict[str, Problem], settings: NearDuplicateProblems) -> list[Verdict]:
    return check_all(sys.modules[__name__], traces, problems, settings)


def digest(traces: list[Trace], problems: dict[str, Problem], settings: NearDuplicateProblems) -> "np.ndarray":
    """A sketch of the trace's problem."""
    asked = list(dict.fromkeys(trace["problem_id"] for trace in traces))
    found = minhash.sketches(words_of([problems[identity]["problem"] for identity in asked]), settings.ngram)
    places = {identity: place for place, identity in enumerate(asked)}
    return found[[places[trace["problem_id"]] for trace in traces]]


def compare(rows: Rows, settings: NearDuplicateProblems) -> Judgement:
    import numpy as np

    # Each problem is compared once, by the first of its traces in the order.
    _, first, number = np.unique(rows.problem[rows.order], return_index=True, return_inverse=True)
    asked = rows.order[np.sort(first)]
    kept = minhash.first_of_each(rows.payload, asked, settings.similarity)
    speaker = np.empty(len(rows.order), dtype=np.int64)  # of each trace, the trace that stood for its problem
    speaker[rows.order] = rows.order[first[number]]
    kept = kept[speaker]

    def reason(row: int) -> str:
        if kept[row] == speaker[row]:
            return "no other problem is nearly the same"
        return f"nearly the problem of trace {rows.name(int(kept[row]))}, which is kept"

    return Judgement(kept == speaker, reason)

"""duplicates: of traces that are the same text for the same problem, one is enough.

The same words and signs in problem and reasoning, whatever the blanks and the case of ASCII letters, by a hash of 128
bits. Kept is the first in the recipe's order among those that passed every other filter.
"""

import hashlib
import sys
from typing import TYPE_CHECKING

from distill.filters.comparing import Judgement, Rows, check_all
from distill.filters.words import trace_words, words_of
from distill.recipe import DuplicatesFilter
from distill.records import Problem, Trace, Verdict

if TYPE_CHECKING:
    import numpy as np

VERSION = 3
WIDTH = 16


def check(traces: list[Trace], problems: dict[str, Problem], settings: DuplicatesFilter) -> list[Verdict]:
    return check_all(sys.modules[__name__], traces, problems, settings)


def digest(traces: list[Trace], problems: dict[str, Problem], settings: DuplicatesFilter) -> "np.ndarray":
    import numpy as np

    found = bytearray()
    asked = words_of([problems[trace["problem_id"]]["problem"] for trace in traces])
    for trace, problem, words in zip(traces, asked, trace_words(traces), strict=True):
        size = len(trace["reasoning"].encode("utf-8", "surrogatepass"))
        inside = int(np.searchsorted(words.start, size))  # the response's words come after
        text = problem.hash.tobytes() + b"\0" + words.hash[:inside].tobytes()
        found += hashlib.blake2b(text, digest_size=WIDTH).digest()
    return np.frombuffer(bytes(found), dtype=np.uint8).reshape(len(traces), WIDTH)


def compare(rows: Rows, settings: DuplicatesFilter) -> Judgement:
    import numpy as np

    first = np.arange(len(rows.order))  # of each trace, the one with the same reasoning that is kept
    if len(first):
        keys = np.ascontiguousarray(rows.payload).view("V16").ravel()[rows.order]
        _, leader, group = np.unique(keys, return_index=True, return_inverse=True)
        first[rows.order] = rows.order[leader[group]]

    def reason(row: int) -> str:
        kept = int(first[row])
        if kept == row:
            return "the first with this reasoning"
        return f"same reasoning as sample {rows.sample[kept]} (trace {rows.name(kept)})"

    return Judgement(first == np.arange(len(first)), reason)

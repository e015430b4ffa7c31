"""near_duplicates: of traces with nearly the same text, whatever their problems, one is enough.

Compared are reasoning and response, by their stretches of `ngram` words (distill.filters.minhash). Kept is the first
in the recipe's order among those that passed every other filter.
"""

import sys
from typing import TYPE_CHECKING

from distill.filters import minhash
from distill.filters.comparing import Judgement, Rows, check_all
from distill.filters.words import trace_words
from distill.recipe import NearDuplicateTraces
from distill.records import Problem, Trace, Verdict

if TYPE_CHECKING:
    import numpy as np

VERSION = 1
WIDTH = minhash.WIDTH


def check(traces: list[Trace], problems: dict[str, Problem], settings: NearDuplicateTraces) -> list[Verdict]:
    return check_all(sys.modules[__name__], traces, problems, settings)


def digest(traces: list[Trace], problems: dict[str, Problem], settings: NearDuplicateTraces) -> "np.ndarray":
    return minhash.sketches(trace_words(traces), settings.ngram)


def compare(rows: Rows, settings: NearDuplicateTraces) -> Judgement:
    import numpy as np

    kept = minhash.first_of_each(rows.payload, rows.order, settings.similarity)

    def reason(row: int) -> str:
        first = int(kept[row])
        if first == row:
            return "the first with this text or one like it"
        alike = float((rows.payload[row].view("<u2") == rows.payload[first].view("<u2")).mean())
        return f"nearly the text (similarity {alike:.2f}) of trace {rows.name(first)}, sample {rows.sample[first]}"

    return Judgement(kept == np.arange(len(kept)), reason)

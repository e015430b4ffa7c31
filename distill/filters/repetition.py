"""repetition: the text does not go round in circles.

Two signs, both in stretches of `ngram` words. A loop: a stretch that immediately repeats itself, over at
least twice its length (and 2·ngram words), is rejected wherever it stands and however long the rest is. A
circle: more than `max_share` of all stretches have occurred before, one after another or not. Reasoners do
repeat themselves when they check a result, so one repeat of a passage is no loop, and in a short text (fewer
than 10·ngram stretches) the share is taken of 10·ngram, so that one step done twice is no circle.

The defaults reject none of 1,292 published traces of R1, QwQ-32B, R1-Distill-Qwen-32B and s1.1-32B, and find
more than 99% of loops spliced into R1's (tests/distill/test_filters_repetition.py).
"""

from typing import TYPE_CHECKING, NamedTuple

from distill.filters.words import CHARACTER, LETTERS, Words, stretch_hashes, trace_words
from distill.recipe import RepetitionFilter
from distill.records import Problem, Trace, Verdict

if TYPE_CHECKING:
    import numpy as np

VERSION = 2


class Loop(NamedTuple):
    """Words start..end (end excluded) are a stretch of `period` words said `times` times in a row."""

    start: int
    end: int
    period: int
    times: float


def check(traces: list[Trace], problems: dict[str, Problem], settings: RepetitionFilter) -> list[Verdict]:
    """Reasoning and response together, since a model can start to loop in either."""
    return [_check(words, settings) for words in trace_words(traces)]


def _check(words: Words, settings: RepetitionFilter) -> Verdict:
    starts, distances = repeats(words.hash, settings.ngram)
    loop = find_loop(words, starts, distances, settings.ngram)
    share = len(starts) / max(len(words) - settings.ngram + 1, 10 * settings.ngram)
    measured = {"repeated": round(share, 4)}
    if loop is not None:
        said = words.text(loop.start, loop.start + min(loop.period, 12))
        more = " ..." if loop.period > 12 else ""
        covered = (loop.end - loop.start) / len(words)
        character = len(words.data[: words.start[loop.start]].decode("utf-8", "replace"))
        return Verdict(
            False,
            f"a loop at words {loop.start + 1} to {loop.end} of {len(words)} ({covered:.0%} of the text): "
            f"{loop.period} words said {loop.times:.3g} times, '{said}{more}'",
            {**measured, "character": character},
        )
    return Verdict(
        share <= settings.max_share, f"{share:.0%} of the stretches of {settings.ngram} words are repeats", measured
    )


def repeats(hashes: "np.ndarray", ngram: int) -> "tuple[np.ndarray, np.ndarray]":
    """Where stretches of `ngram` words begin that occurred before, and how far before each occurred last.

    Both int64 of shape (repeats,), in the order of the text.
    """
    import numpy as np

    stretches = stretch_hashes(hashes, ngram)
    order = np.argsort(stretches)
    ordered = stretches[order]
    same = ordered[1:] == ordered[:-1]
    if not same.any():
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # Only what is repeated is put in order within its equals.
    repeated = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    places, values = order[repeated], ordered[repeated]
    sorting = np.lexsort((places, values))
    places, values = places[sorting], values[sorting]
    again = np.flatnonzero(values[1:] == values[:-1]) + 1
    starts, distances = places[again], places[again] - places[again - 1]
    sorting = np.argsort(starts)
    return starts[sorting], distances[sorting]


def find_loop(words: Words, starts: "np.ndarray", distances: "np.ndarray", ngram: int) -> Loop | None:
    """The longest loop, or None. A loop of punctuation alone is a drawn line or a table's rule, not a loop."""
    import numpy as np

    if not len(starts):
        return None
    # Runs of neighbouring stretches that each repeat what stands the same distance before them.
    edges = np.flatnonzero((np.diff(distances) != 0) | (np.diff(starts) != 1)) + 1
    firsts, lasts = np.concatenate([[0], edges]), np.concatenate([edges, [len(starts)]]) - 1
    period = distances[firsts]
    repeated = lasts - firsts + ngram  # words that repeat, beyond the first saying
    best = None
    for run in np.flatnonzero(repeated >= 2 * np.maximum(period, ngram)).tolist():
        first, step, length = int(starts[firsts[run]]), int(period[run]), int(repeated[run])
        kinds = words.kind[first : first + step]
        if not ((kinds == LETTERS) | (kinds == CHARACTER)).any():
            continue
        loop = Loop(first - step, first + length, step, 1 + length / step)
        if best is None or loop.end - loop.start > best.end - best.start:
            best = loop
    return best

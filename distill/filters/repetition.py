"""repetition: the text does not go round in circles.

Two signs, both in stretches of `ngram` words. A loop: a stretch that immediately repeats itself, over at
least twice its length (and 2·ngram words), is rejected wherever it stands and however long the rest is. A
circle: more than `max_share` of all stretches have occurred before, one after another or not. Reasoners do
repeat themselves when they check a result, so one repeat of a passage is no loop, and in a short text (fewer
than 10·ngram stretches) the share is taken of 10·ngram, so that one step done twice is no circle.

The defaults reject none of 1,292 published traces of R1, QwQ-32B, R1-Distill-Qwen-32B and s1.1-32B, and find
more than 99% of loops spliced into R1's (tests/distill/test_filters_repetition.py).
"""

import re
from typing import TYPE_CHECKING, NamedTuple

from distill.recipe import RepetitionFilter
from distill.records import Problem, Trace, Verdict

if TYPE_CHECKING:
    import numpy as np

VERSION = 1

# CJK signs stand for themselves (there are no blanks to split at); a run of letters longer than any word is split
# into letters, or "aaaa…" would be one word.
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]{{1,40}}|[^\w\s]")
_LONGEST_WORD = 40


class Loop(NamedTuple):
    """Words start..end (end excluded) are a stretch of `period` words said `times` times in a row."""

    start: int
    end: int
    period: int
    times: float


def check(traces: list[Trace], problems: dict[str, Problem], settings: RepetitionFilter) -> list[Verdict]:
    """Reasoning and response together, since a model can start to loop in either."""
    return [_check(f"{trace['reasoning']}\n{trace['response']}", settings) for trace in traces]


def _check(text: str, settings: RepetitionFilter) -> Verdict:
    words = split_words(text)
    previous = previous_occurrences(words, settings.ngram)
    loop = find_loop(words, previous, settings.ngram)
    if loop is not None:
        said = " ".join(words[loop.start : loop.start + min(loop.period, 12)])
        more = " ..." if loop.period > 12 else ""
        share = (loop.end - loop.start) / len(words)
        return Verdict(
            False,
            f"a loop at words {loop.start + 1} to {loop.end} of {len(words)} ({share:.0%} of the text): "
            f"{loop.period} words said {loop.times:.3g} times, '{said}{more}'",
        )
    repeats = int((previous >= 0).sum())
    share = repeats / max(len(previous), 10 * settings.ngram)
    reason = f"{share:.0%} of the stretches of {settings.ngram} words are repeats"
    return Verdict(share <= settings.max_share, reason)


def split_words(text: str) -> list[str]:
    """Words, numbers and single signs."""
    words: list[str] = []
    for word in _WORD.findall(text):
        if len(word) < _LONGEST_WORD:
            words.append(word)
        else:
            words.extend(word)
    return words


def previous_occurrences(words: list[str], ngram: int) -> "np.ndarray":
    """For each start of a stretch of `ngram` words: where the same stretch began last, or -1. Shape (stretches,)."""
    import numpy as np

    count = len(words) - ngram + 1
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
    # Stretches are compared by a 64-bit hash; among 10,000 stretches a collision has a chance of 3e-12.
    ids = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    ids ^= ids >> np.uint64(29)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(ngram):
        hashes = hashes * np.uint64(0xD1342543DE82EF95) + ids[offset : offset + count]
        hashes ^= hashes >> np.uint64(32)
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    previous = np.full(count, -1, dtype=np.int64)
    previous[order[1:][same]] = order[:-1][same]
    return previous


def find_loop(words: list[str], previous: "np.ndarray", ngram: int) -> Loop | None:
    """The longest loop, or None. A loop of punctuation alone is a drawn line or a table's rule, not a loop."""
    import numpy as np

    if not len(previous):
        return None
    starts = np.arange(len(previous))
    distance = np.where(previous >= 0, starts - previous, 0)
    # Runs of stretches that each repeat what stands the same distance before them.
    edges = np.flatnonzero(np.diff(distance)) + 1
    firsts, lasts = np.concatenate([[0], edges]), np.concatenate([edges, [len(previous)]]) - 1
    period = distance[firsts]
    repeated = lasts - firsts + ngram  # words that repeat, beyond the first saying
    looping = (period > 0) & (repeated >= 2 * np.maximum(period, ngram))
    best = None
    for run in np.flatnonzero(looping):
        first, step, length = int(firsts[run]), int(period[run]), int(repeated[run])
        if not any(word.isalnum() for word in words[first : first + step]):
            continue
        loop = Loop(first - step, first + length, step, 1 + length / step)
        if best is None or loop.end - loop.start > best.end - best.start:
            best = loop
    return best

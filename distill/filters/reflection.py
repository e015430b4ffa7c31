"""reflection: how often a trace reconsiders. A measured feature, not a filter: every trace passes.

Counted are single words and phrases of R1's habit ("wait", "let me check", "alternatively"), in four groups, and
their number per 1,000 words. English only so far.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

from distill.filters.words import LETTERS, Words, cut_words, trace_words
from distill.recipe import ReflectionFilter
from distill.records import Problem, Trace, Verdict

if TYPE_CHECKING:
    import numpy as np

VERSION = 1

MARKERS = {
    "wait": ("wait", "hold on", "hmm", "hmmm", "oh no", "oops"),
    "check": (
        "let me check", "let me verify", "let me double check", "let me double-check", "let's check", "let's verify",
        "double-check", "double check", "let me recheck", "let me make sure", "let me confirm", "to verify",
        "to make sure", "just to be sure", "just to confirm", "check again", "let me test",
    ),
    "alternative": (
        "alternatively", "another way", "another approach", "different approach", "let me try", "on the other hand",
        "instead of that", "maybe i should", "what if",
    ),
    "backtrack": (
        "that's not right", "that's wrong", "that is wrong", "that can't be", "that doesn't make sense",
        "i made a mistake", "my mistake", "i was wrong", "no, that", "let me start over", "let me rethink",
        "let me reconsider", "go back", "going back", "scratch that", "not correct", "is incorrect",
        "on second thought",
    ),
}  # fmt: skip


def check(traces: list[Trace], problems: dict[str, Problem], settings: ReflectionFilter) -> list[Verdict]:
    """Reasoning and response together."""
    return [_measure(words) for words in trace_words(traces)]


def _measure(words: Words) -> Verdict:
    counts = count_markers(words)
    total = sum(counts.values())
    spoken = max(int((words.kind == LETTERS).sum()), 1)
    rate = 1000 * total / spoken
    said = ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"
    return Verdict(True, f"{rate:.3g} a 1,000 words ({said})", {**counts, "per_1000_words": round(rate, 2)})


def count_markers(words: Words) -> dict[str, int]:
    """How often each group occurs; of a phrase inside a longer one the longer counts ("let me check again")."""
    import numpy as np

    counts = dict.fromkeys(MARKERS, 0)
    singles, pairs, phrases = _phrases()
    may = singles.take(_slot(words.hash))
    may[:-1] |= pairs.take(_slot(_pair(words.hash)))
    free = 0
    for place in np.flatnonzero(may).tolist():
        if place < free:
            continue
        for size, known in phrases:
            group = known.get(words.hash[place : place + size].tobytes())
            if group is not None:
                counts[group] += 1
                free = place + size
                break
    return counts


def _pair(hashes: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return hashes[:-1] * np.uint64(3) + hashes[1:]


def _slot(hashes: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return (hashes >> np.uint64(46)).astype(np.int64)


@lru_cache(maxsize=1)
def _phrases() -> "tuple[np.ndarray, np.ndarray, list[tuple[int, dict[bytes, str]]]]":
    """(may a word be a phrase, may two words begin one, and the phrases: by length, the longest first, to group).

    The first two are looked up by 18 bits of a hash; next to every word is sorted out by them.
    """
    import numpy as np

    singles, pairs = np.zeros(1 << 18, dtype=bool), np.zeros(1 << 18, dtype=bool)
    by_size: dict[int, dict[bytes, str]] = {}
    for group, phrases in MARKERS.items():
        for words in cut_words(phrases):
            if len(words) == 1:
                singles[_slot(words.hash)] = True
            else:
                pairs[_slot(_pair(words.hash[:2]))] = True
            by_size.setdefault(len(words), {})[words.hash.tobytes()] = group
    return singles, pairs, sorted(by_size.items(), reverse=True)

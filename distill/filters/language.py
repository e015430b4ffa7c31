"""language: the trace keeps to the problem's language. R1's language-consistency score, with its reason.

R1's reward is the share of words in the target language (arXiv 2501.12948, section 2.3.2), and its SFT data leaves
mixed languages out. Here a word is foreign if its script is not the problem's, or, within one script, if it stands
in a window of 8 or 12 words of which several are small words of another language only (distill.filters.function_words)
and next to none of the problem's. Formulas, LaTeX commands and code have no language, nor have numbers, single
letters and what the problem itself quotes.

Rejected: too small a share, and a stretch of foreign words wherever it stands, since in a trace of 5,000 words a
whole foreign sentence is 0.2%. Among Latin letters one sign of another script is such a stretch.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from distill.filters.function_words import LANGUAGES, function_words
from distill.filters.words import CHARACTER, LETTERS, Words, trace_words, vocabulary, words_of
from distill.recipe import LanguageFilter
from distill.records import Problem, Trace, Verdict

if TYPE_CHECKING:
    import numpy as np

VERSION = 2

_WINDOWS = (8, 12)  # words: a clause, and a sentence with fewer small words
_FOREIGN, _OWN = 4, 1  # at least so many small words of another language, and at most so many of the target's

_MAX_RUN = 2  # foreign words in a row, in a language that is not written in Latin letters

NEUTRAL, LATIN, HAN, KANA, HANGUL, CYRILLIC, GREEK, ARABIC, HEBREW, DEVANAGARI, THAI, OTHER = range(12)
_SCRIPTS = (  # by code
    "neutral", "Latin", "Chinese", "Japanese", "Korean", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Thai",
    "another script",
)  # fmt: skip

# Inline formulas end on their line and touch their dollars, or "$5 and $10" would be one.
_EXEMPT = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]{1,400}`|\$\$[^$]{1,4000}\$\$|\$(?![\s$])[^$\n]{1,400}(?<!\s)\$(?!\d)"
    r"|\\\((?:[^\\]|\\(?![()\[\]])){1,4000}\\\)|\\\[(?:[^\\]|\\(?![()\[\]])){1,4000}\\\]|\\(?:begin|end)\{[^{}\n]{1,40}\}",
    re.DOTALL,
)


class Target(NamedTuple):
    """What a trace should be written in."""

    name: str  # a code of LANGUAGES, or a script's name
    scripts: frozenset[int]


def check(traces: list[Trace], problems: dict[str, Problem], settings: LanguageFilter) -> list[Verdict]:
    """Reasoning and response together. A problem without words takes the trace's own main language for its own."""
    asked = [problems[trace["problem_id"]]["problem"] for trace in traces]
    return [_check(*found, settings) for found in zip(trace_words(traces), words_of(asked), strict=True)]


def _check(words: Words, problem: Words, settings: LanguageFilter) -> Verdict:
    import numpy as np

    target = _named(settings.language) if settings.language else main_language(problem) or main_language(words)
    if target is None:
        return Verdict(True, "no words", {"consistency": 1.0})
    foreign, bearing, script = foreign_words(words, target)
    if foreign.any():  # formulas and code, and what the problem quotes, are looked for only where they may matter
        quoted = problem.hash
        kept = ~exempt(words) & ~np.isin(words.hash, quoted[np.isin(quoted, words.hash[foreign])])
        foreign, bearing, script = foreign_words(words, target, kept)
    total, count = int(bearing.sum()), int(foreign.sum())
    share = 1.0 if not total else 1 - count / total
    measured = {"consistency": round(share, 4)}
    if not count:
        return Verdict(True, f"all {total} words are {target.name}", measured)
    begin, stop = longest_run(foreign, bearing)
    run = int(foreign[begin:stop].sum())
    # English words stand in Chinese text by right; a Chinese sign in English text is a slip.
    allowed = settings.max_run if settings.max_run is not None else 0 if LATIN in target.scripts else _MAX_RUN
    passed = share >= settings.min_share and run <= allowed
    said = words.text(begin, min(stop, begin + 16))
    other = _other(words, script, foreign, target)
    return Verdict(
        passed,
        f"{share:.1%} of {total} words are {target.name}; {count} are not ({other}), {run} of them in a row "
        f"at word {begin + 1}: '{said}'",
        {**measured, "foreign_run": run},
    )


def foreign_words(
    words: Words, target: Target, kept: "np.ndarray | None" = None
) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """(is foreign, has a language at all, script) of each word; bool, bool, uint8. Only `kept` words can have one."""
    import numpy as np

    script = scripts(words)
    bearing = script != NEUTRAL
    if kept is not None:
        bearing &= kept
    foreign = bearing & ~_among(script, target.scripts)
    if target.name in LANGUAGES or LATIN not in target.scripts:
        latin = np.flatnonzero(bearing & (script == LATIN))
        if LATIN in target.scripts:
            known = languages_of(words.hash[latin])
            own = (known >> LANGUAGES.index(target.name)) & 1
            other = ((known != 0) & (own == 0)).astype(np.int32)
            if int(other.sum()) >= _FOREIGN:
                foreign[latin[_windows(other, own.astype(np.int32))]] = True
    return foreign, bearing, script


def _windows(other: "np.ndarray", own: "np.ndarray") -> "np.ndarray":
    """Which words lie in a window that is another language's, from its first such word to its last."""
    import numpy as np

    marks = np.zeros(len(other) + 1, dtype=np.int32)
    sums = [np.concatenate([[0], np.cumsum(flags)]) for flags in (other, own)]
    places = np.flatnonzero(other)
    for size in _WINDOWS:
        size = min(size, len(other))
        others, owns = (running[size:] - running[:-size] for running in sums)
        hits = np.flatnonzero((others >= _FOREIGN) & (owns <= _OWN))
        # A window that straddles the border has words of both: trim it to what is surely foreign.
        np.add.at(marks, places[np.searchsorted(places, hits)], 1)
        np.add.at(marks, places[np.searchsorted(places, hits + size) - 1] + 1, -1)
    return np.cumsum(marks[:-1]) > 0


def longest_run(foreign: "np.ndarray", bearing: "np.ndarray") -> tuple[int, int]:
    """Words begin..stop (excluded) of the longest stretch in which every word that has a language is foreign."""
    import numpy as np

    places = np.flatnonzero(bearing)
    flags = foreign[places]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    begins, stops = edges[::2], edges[1::2]
    longest = int(np.argmax(stops - begins))
    return int(places[begins[longest]]), int(places[stops[longest] - 1]) + 1


def main_language(words: Words) -> Target | None:
    """The language most words are in; of Latin script it is English where the small words do not tell.

    None for a text without words, a bare formula.
    """
    import numpy as np

    script = scripts(words)
    bearing = (script != NEUTRAL) & ~exempt(words)
    counts = np.bincount(script[bearing], minlength=OTHER + 1)
    if not counts.sum():
        return None
    if counts[LATIN] < counts.sum() * 0.5 or counts[KANA] + counts[HAN] > counts.sum() * 0.3:
        counts[LATIN] = 0  # signs are short and formulas Latin, so a minority of another script decides
    top = int(np.argmax(counts))
    if top == LATIN:
        known = languages_of(words.hash[bearing & (script == LATIN)])
        hits = ((known[:, None] >> np.arange(len(LANGUAGES))) & 1).sum(axis=0)
        best = int(np.argmax(hits))
        return _named(LANGUAGES[best] if hits[best] >= max(3, 1.5 * hits[0]) else "en")
    if top in (HAN, KANA):
        top = KANA if counts[KANA] > 0.1 * counts[HAN] else HAN
    return _named(_SCRIPTS[top])


def _named(name: str) -> Target:
    if name in LANGUAGES:
        return Target(name, frozenset({LATIN}))
    script = _SCRIPTS.index(name)
    return Target(name, frozenset({HAN, KANA} if script == KANA else {HAN, HANGUL} if script == HANGUL else {script}))


def exempt(words: Words) -> "np.ndarray":
    """Which words stand in a formula or in code; bool of shape (words,)."""
    import numpy as np

    text = words.data.decode("utf-8", "surrogatepass")
    spans = [match.span() for match in _EXEMPT.finditer(text)] if re.search(r"[$`\\]", text) else []
    if not spans:
        return np.zeros(len(words), dtype=bool)
    places = np.array(spans).ravel()
    if not text.isascii():  # places are in characters, words in bytes
        sizes = np.frombuffer(words.data, dtype=np.uint8)
        begins = np.flatnonzero((sizes & 0xC0) != 0x80)
        places = np.append(begins, len(sizes))[places]
    return (np.searchsorted(places, words.start, side="right") & 1).astype(bool)


def scripts(words: Words) -> "np.ndarray":
    """The script of each word: LATIN and so on, NEUTRAL for what has no language; uint8 of shape (words,)."""
    import numpy as np

    if not len(words):
        return np.zeros(0, dtype=np.uint8)
    signs = np.frombuffer(words.data, dtype=np.uint8)
    length = words.end - words.start
    lowered = words.first | 0x20
    latin = (words.kind == LETTERS) & (lowered >= 0x61) & (lowered <= 0x7A) & (length > 1)
    latin &= (signs[words.start - 1] != 0x5C) | (words.start == 0)  # not a LaTeX command
    script = latin.astype(np.uint8)
    wide = np.flatnonzero((words.first >= 0xC3) & ((words.kind == LETTERS) | (words.kind == CHARACTER)))
    if len(wide):
        pair = words.first[wide].astype(np.int64) << 8
        pair |= signs[np.minimum(words.start[wide] + 1, len(signs) - 1)]
        script[wide] = _script_table().take(pair)
        # αβ is a product and Δ_time a variable, Привет a word
        short = (length[wide] < 6) | (signs[words.end[wide] - 1] < 0x80)
        short &= (script[wide] == GREEK) | (script[wide] == CYRILLIC)
        script[wide[short]] = NEUTRAL
        script[wide[(length[wide] < 4) & (script[wide] == LATIN)]] = NEUTRAL
    return script


@lru_cache(maxsize=1)
def _script_table() -> "np.ndarray":
    """From the first two bytes of a word's UTF-8."""
    import numpy as np

    table = np.full(1 << 16, OTHER, dtype=np.uint8)
    ranges = (
        (0xC380, 0xC9BF, LATIN), (0xCA80, 0xCDBF, NEUTRAL), (0xCDB0, 0xCFBF, GREEK), (0xD080, 0xD4AF, CYRILLIC),
        (0xD690, 0xD7BF, HEBREW), (0xD880, 0xDBBF, ARABIC), (0xDD90, 0xDDBF, ARABIC), (0xE0A4, 0xE0A5, DEVANAGARI),
        (0xE0B8, 0xE0B9, THAI), (0xE1B8, 0xE1BB, LATIN), (0xE1B4, 0xE1B7, NEUTRAL), (0xE380, 0xE380, NEUTRAL),
        (0xE381, 0xE383, KANA), (0xE384, 0xE38F, NEUTRAL), (0xE390, 0xE9BF, HAN), (0xEAB0, 0xED9F, HANGUL),
        (0xEDA0, 0xEDBF, NEUTRAL),
    )  # fmt: skip
    for low, high, script in ranges:
        table[low : high + 1] = script
    return table


def _among(script: "np.ndarray", wanted: frozenset[int]) -> "np.ndarray":
    import numpy as np

    table = np.zeros(OTHER + 1, dtype=bool)
    table[list(wanted)] = True
    return table.take(script)


def languages_of(hashes: "np.ndarray") -> "np.ndarray":
    """The languages whose small word each is, a bit each; int32 of the same shape."""
    known, bits, table = _vocabulary()
    place = table.take((hashes >> 46).astype("int64"))
    return bits.take(place) * (known.take(place) == hashes)


@lru_cache(maxsize=1)
def _vocabulary() -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """(hashes, their languages' bits, and where to look for a hash by its upper 18 bits)."""
    import numpy as np

    words = function_words()
    hashes = vocabulary(list(words))
    table = np.zeros(1 << 18, dtype=np.int32)
    table[(hashes >> np.uint64(46)).astype(np.int64)] = np.arange(len(hashes))
    return hashes, np.array(list(words.values()), dtype=np.int32), table


def _other(words: Words, script: "np.ndarray", foreign: "np.ndarray", target: Target) -> str:
    """What the foreign words are, in a word or two."""
    import numpy as np

    counts = np.bincount(script[foreign], minlength=OTHER + 1)
    top = int(np.argmax(counts))
    if top != LATIN:
        return _SCRIPTS[top]
    known = languages_of(words.hash[foreign & (script == LATIN)])
    hits = [int(((known >> bit) & 1).sum()) * (name != target.name) for bit, name in enumerate(LANGUAGES)]
    return LANGUAGES[int(np.argmax(hits))] if any(hits) else "Latin"

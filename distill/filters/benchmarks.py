"""Evaluation sets as something a problem can be looked up in: what decontamination compares with.

An item is found in four ways, told apart in the report because they mean different things: the same text; a long part
of it inside another text; nearly the same words; the same but for the numbers.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.files import sha256_file
from distill.filters.words import SIGN, Words, cut_words, stretch_hashes, vocabulary
from distill.recipe import DecontaminationFilter, ProblemSource

if TYPE_CHECKING:
    import numpy as np

TRIPLE = 3
_SHORTEST = 5  # words of an item that is looked for inside longer problems
_SPOKEN = 8  # words besides the numbers of a text that may be another one's variant: drills are all alike
_TYPESETTING = re.compile(
    r"\\(?:left|right|displaystyle|limits|text|textbf|textit|mathrm|mathbf|mbox|operatorname)(?![A-Za-z])"
    r"|\\[,;:! ]|[${}]|(?<=\d),(?=\d{3})"
)
_NUMBER_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand twice thrice half
"""


class Match(NamedTuple):
    """A training problem is an evaluation item, or close to one."""

    how: str  # "same text", "part of the text", "nearly the same", "other numbers"
    score: float  # 1 for the same text, else the share of it or the similarity
    benchmark: str
    item: int  # its row, from 1
    text: str


class Index:
    """All items of the sets. Built once a process; 20,000 items take about 100 MB while building, 60 after."""

    def __init__(self, settings: DecontaminationFilter) -> None:
        self.settings = settings
        self.names: list[str] = []
        self.texts: list[str] = []
        self.places: list[tuple[int, int]] = []  # (benchmark, row)
        self.facts: list[dict[str, str | int]] = []
        for number, source in enumerate(settings.against):
            texts = read_texts(source)
            self.names.append(benchmark_name(source))
            self.texts += texts
            self.places += [(number, row + 1) for row in range(len(texts))]
            self.facts.append({"name": self.names[-1], "rows": len(texts), "sha256": texts_hash(texts)})
        items = [spoken_hashes(words) for words in clean_words(self.texts)]
        masked = [masked_hashes(hashes, number) for hashes, number in items]
        varied = [int((~number).sum()) >= _SPOKEN for _, number in items]
        self.whole = _firsts([_whole(hashes) for hashes, _ in items])
        self.masked = _firsts([_whole(found) if may else None for found, may in zip(masked, varied, strict=True)])
        size = settings.ngram
        self.stretches = _Postings([stretch_hashes(hashes, size) for hashes, _ in items])
        # Items shorter than a stretch are looked for as a whole, at any place.
        self.short = {
            n: _Postings([stretch_hashes(h, n) if len(h) == n else h[:0] for h, _ in items])
            for n in range(_SHORTEST, size)
        }
        self.triples = _Postings([_triples(hashes) for hashes, _ in items])
        self.masked_triples = _Postings(
            [_triples(found) if may else found[:0] for found, may in zip(masked, varied, strict=True)]
        )

    def find(self, words: Words) -> Match | None:
        """The item that a text (see clean_words) is or comes closest to, if it is too close."""
        settings = self.settings
        hashes, number = spoken_hashes(words)
        if not len(hashes):
            return None
        if (same := self.whole.get(_whole(hashes))) is not None:
            return self._match("same text", 1.0, same)
        row, share = self.stretches.most(stretch_hashes(hashes, settings.ngram), lambda shared, sizes: shared / sizes)
        if row >= 0 and share > settings.max_overlap:
            return self._match("part of the text", share, row)
        for size, known in self.short.items():
            row, share = known.most(stretch_hashes(hashes, size), lambda shared, sizes: shared / sizes)
            if row >= 0:
                return self._match("part of the text", share, row)
        row, alike = self.triples.most_similar(_triples(hashes), settings.similarity)
        if row >= 0:
            return self._match("nearly the same", alike, row)
        if settings.numbers and int((~number).sum()) >= _SPOKEN:
            masked = masked_hashes(hashes, number)
            if (same := self.masked.get(_whole(masked))) is not None:
                return self._match("other numbers", 1.0, same)
            row, alike = self.masked_triples.most_similar(_triples(masked), max(settings.similarity, 0.8))
            if row >= 0:
                return self._match("other numbers", alike, row)
        return None

    def _match(self, how: str, score: float, row: int) -> Match:
        benchmark, place = self.places[row]
        return Match(how, round(float(score), 3), self.names[benchmark], place, self.texts[row])


class _Postings:
    """For each hash the items that have it: two parallel sorted arrays, and a table that says quickly of most that
    none has it.
    """

    def __init__(self, items: "Sequence[np.ndarray]") -> None:
        import numpy as np

        items = [np.unique(item) for item in items]
        sizes = np.array([len(item) for item in items], dtype=np.int64)
        hashes = np.concatenate([*items, np.empty(0, np.uint64)])
        rows = np.repeat(np.arange(len(items), dtype=np.int32), sizes)
        order = np.argsort(hashes, kind="stable")
        self.sizes, self.hashes, self.rows = np.maximum(sizes, 1), hashes[order], rows[order]
        bits = max(12, min(22, len(hashes).bit_length() + 5))
        self._shift = np.uint64(64 - bits)
        self._may = np.zeros(1 << bits, dtype=bool)
        self._may[self._slot(hashes)] = True

    def _slot(self, hashes: "np.ndarray") -> "np.ndarray":
        import numpy as np

        return (hashes >> self._shift).astype(np.int64)

    def most_similar(self, wanted: "np.ndarray", similarity: float) -> tuple[int, float]:
        """(item, Jaccard similarity) of the most similar one with at least `similarity`; else (-1, 0)."""
        import numpy as np

        if not len(wanted) or np.count_nonzero(self._may.take(self._slot(wanted))) < similarity * len(
            set(wanted.tolist())
        ):
            return -1, 0.0  # it cannot share enough
        wanted = np.unique(wanted)
        size = len(wanted)
        row, alike = self.most(wanted, lambda shared, sizes: shared / (sizes + size - shared))
        return (row, alike) if alike >= similarity else (-1, 0.0)

    def most(self, wanted: "np.ndarray", score: Any) -> tuple[int, float]:
        """(item, score) with the highest score(hashes shared, hashes of the item); (-1, 0) if none shares one."""
        import numpy as np

        wanted = wanted[self._may.take(self._slot(wanted))]
        if not len(wanted):
            return -1, 0.0
        wanted = np.unique(wanted)
        begins = np.searchsorted(self.hashes, wanted)
        counts = np.searchsorted(self.hashes, wanted, side="right") - begins
        begins, counts = begins[counts > 0], counts[counts > 0]
        if not len(counts):
            return -1, 0.0
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found, shared = np.unique(self.rows[np.repeat(begins, counts) + steps], return_counts=True)
        scores = score(shared, self.sizes[found])
        top = int(np.argmax(scores))
        return int(found[top]), float(scores[top])


Opened = tuple[str, tuple[tuple[int, int] | None, ...]]  # the settings as JSON, and what tells a file's versions apart


def opened(settings: DecontaminationFilter) -> Opened:
    paths = [Path(source.source) for source in settings.against]
    stats = [path.stat() if path.is_file() else None for path in paths]
    return settings.model_dump_json(), tuple(stat and (stat.st_mtime_ns, stat.st_size) for stat in stats)


@lru_cache(maxsize=2)
def open_index(chosen: Opened) -> Index:
    """The index of a filter's settings, read anew when a file has changed."""
    return Index(DecontaminationFilter.model_validate_json(chosen[0]))


def read_texts(source: ProblemSource) -> list[str]:
    """The problems' texts of an evaluation set. Raises UserError as reading problems does."""
    from distill.problem_sources import source_problems
    from distill.procedural import reasoning_gym_problems

    if source.source == "reasoning-gym":
        made = reasoning_gym_problems(source.families, source.seed, "train" if source.split == "train" else "heldout")
        return [problem["problem"] for problem in islice(made, source.count)]
    # Only the text is wanted: the answer may be in any form.
    asked = source.model_copy(update={"answer": None})
    return [problem["problem"] for problem in source_problems(asked, "filters.decontamination.against")]


def benchmark_name(source: ProblemSource) -> str:
    name = Path(source.source).name
    return name if source.split is None else f"{name} ({source.split})"


def texts_hash(texts: Sequence[str]) -> str:
    """Hex sha256 of the sorted hashes of the normalised texts, one a line, as the manifest's of evaluation problems."""
    from distill.identity import problem_hash

    return hashlib.sha256("\n".join(sorted(map(problem_hash, texts))).encode()).hexdigest()


def source_key(source: ProblemSource) -> str:
    """What a verdict against this source rests on: its content, or the name where that is no file."""
    path = Path(source.source)
    return sha256_file(path) if path.is_file() else source.source


def clean_words(texts: Sequence[str]) -> list[Words]:
    """Texts as they are compared: without typesetting, compatibility forms or commas in numbers."""
    return cut_words([_TYPESETTING.sub(" ", unicodedata.normalize("NFKC", text)) for text in texts])


def spoken_hashes(words: Words) -> "tuple[np.ndarray, np.ndarray]":
    """(the words that are no sign, which of them are numbers)."""
    import numpy as np

    spoken = words.kind != SIGN
    hashes, first = words.hash[spoken], words.first[spoken]
    slots = _number_words().take((hashes >> np.uint64(40)).astype(np.int64) & 0xFFFF)
    return hashes, ((first >= 0x30) & (first <= 0x39)) | (slots == hashes)


def masked_hashes(hashes: "np.ndarray", number: "np.ndarray") -> "np.ndarray":
    """The words with every number the same; "3.50" and "4" are both one."""
    import numpy as np

    masked = np.where(number, np.uint64(7), hashes)
    if len(masked):
        masked = masked[np.concatenate([[True], ~(number[1:] & number[:-1])])]
    return masked


def _triples(hashes: "np.ndarray") -> "np.ndarray":
    return stretch_hashes(hashes, max(1, min(TRIPLE, len(hashes))))


def _whole(hashes: "np.ndarray") -> int:
    return int(stretch_hashes(hashes, len(hashes))[0]) if len(hashes) else 0


def _firsts(values: Sequence[int | None]) -> dict[int, int]:
    """Where each value stands first."""
    found: dict[int, int] = {}
    for row, value in enumerate(values):
        if value is not None:
            found.setdefault(value, row)
    return found


@lru_cache(maxsize=1)
def _number_words() -> "np.ndarray":
    """A number word's hash at the place that 16 bits of it give; other places hold what no word there has."""
    import numpy as np

    table = np.zeros(1 << 16, dtype=np.uint64)
    hashes = vocabulary(_NUMBER_WORDS.split())
    table[(hashes >> np.uint64(40)).astype(np.int64) & 0xFFFF] = hashes
    return table

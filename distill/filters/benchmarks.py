"""Evaluation sets as something a problem can be looked up in: what decontamination compares with.

An item is found in four ways, told apart in the report because they mean different things: the same text; a long part
of it inside another text; nearly the same words; the same but for the numbers.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from distill.files import sha256_file
from distill.filters.words import SIGN, Words, cut_words, mixed, stretch_hashes, vocabulary
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


class _Text(NamedTuple):
    """A text as its words without signs; once with its numbers, once with each number the same."""

    whole: int
    masked: int
    stretches: "np.ndarray"  # distinct stretches of the filter's ngram
    triples: "np.ndarray"  # distinct
    masked_triples: "np.ndarray"
    spoken: int  # words that are no number
    hashes: "np.ndarray"


class Index:
    """All items of the sets. Built once a process; 20,000 items take about 100 MB while building, 60 after."""

    def __init__(self, settings: DecontaminationFilter) -> None:
        import numpy as np

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
        items = [_text(words, settings.ngram) for words in _clean_words(self.texts)]
        self.whole = {item.whole: row for row, item in reversed(list(enumerate(items)))}
        self.masked = {i.masked: row for row, i in reversed(list(enumerate(items))) if i.spoken >= _SPOKEN}
        self.stretches = _Postings([item.stretches for item in items])
        self.triples = _Postings([item.triples for item in items])
        self.masked_triples = _Postings([i.masked_triples if i.spoken >= _SPOKEN else i.triples[:0] for i in items])
        # Items shorter than a stretch are looked for as a whole, at any place.
        self.short: dict[int, dict[int, int]] = {}
        for row, item in enumerate(items):
            size = len(item.hashes)
            if _SHORTEST <= size < settings.ngram:
                key = int(stretch_hashes(item.hashes, size)[0])
                self.short.setdefault(size, {}).setdefault(key, row)
        del items
        self.known_short = {size: np.sort(np.array(list(found), dtype=np.uint64)) for size, found in self.short.items()}

    def find(self, problem: str) -> Match | None:
        """The item that the problem is or comes closest to, if it is too close."""
        [words] = _clean_words([problem])
        return self.find_words(words)

    def find_words(self, words: Words) -> Match | None:
        import numpy as np

        settings = self.settings
        text = _text(words, settings.ngram)
        if not len(text.hashes):
            return None
        if text.whole in self.whole:
            return self._match("same text", 1.0, self.whole[text.whole])
        row, shared = self.stretches.most(text.stretches, lambda shared, sizes: shared / sizes)
        if row >= 0 and shared > settings.max_overlap:
            return self._match("part of the text", shared, row)
        for size, known in self.known_short.items():
            found = stretch_hashes(text.hashes, size)
            hits = found[known.take(np.searchsorted(known, found), mode="clip") == found]
            if len(hits):
                return self._match("part of the text", 1.0, self.short[size][int(hits[0])])
        size = len(text.triples)
        row, alike = self.triples.most(text.triples, lambda shared, sizes: shared / (sizes + size - shared))
        if row >= 0 and alike >= settings.similarity:
            return self._match("nearly the same", alike, row)
        if settings.numbers and text.spoken >= _SPOKEN:
            if text.masked in self.masked:
                return self._match("other numbers", 1.0, self.masked[text.masked])
            size = len(text.masked_triples)
            row, alike = self.masked_triples.most(
                text.masked_triples, lambda shared, sizes: shared / (sizes + size - shared)
            )
            if row >= 0 and alike >= max(settings.similarity, 0.8):
                return self._match("other numbers", alike, row)
        return None

    def _match(self, how: str, score: float, row: int) -> Match:
        benchmark, place = self.places[row]
        return Match(how, round(float(score), 3), self.names[benchmark], place, self.texts[row])


class _Postings:
    """For each hash the items that have it: two parallel sorted arrays."""

    def __init__(self, items: "Sequence[np.ndarray]") -> None:
        import numpy as np

        sizes = np.array([len(item) for item in items], dtype=np.int64)
        hashes = np.concatenate([*items, np.empty(0, np.uint64)])
        rows = np.repeat(np.arange(len(items), dtype=np.int32), sizes)
        order = np.argsort(hashes, kind="stable")
        self.sizes, self.hashes, self.rows = np.maximum(sizes, 1), hashes[order], rows[order]

    def most(self, wanted: "np.ndarray", score) -> tuple[int, float]:  # type: ignore[no-untyped-def]
        """(item, score) with the highest score(hashes shared, hashes of the item); (-1, 0) if none shares one."""
        import numpy as np

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


@lru_cache(maxsize=2)
def open_index(settings: str) -> Index:
    """The index of a filter's settings, given as JSON."""
    return Index(DecontaminationFilter.model_validate_json(settings))


def read_texts(source: ProblemSource) -> list[str]:
    """The problems' texts of an evaluation set. Raises UserError as reading problems does."""
    from distill.problem_sources import source_problems

    return [problem["problem"] for problem in source_problems(source.model_copy(update={"answer": None}), "against")]


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


def _clean_words(texts: Sequence[str]) -> list[Words]:
    return cut_words([_TYPESETTING.sub(" ", unicodedata.normalize("NFKC", text)) for text in texts])


def _text(words: Words, ngram: int) -> _Text:
    import numpy as np

    spoken = words.kind != SIGN
    hashes = words.hash[spoken]
    first = words.first[spoken]
    number = (first >= 0x30) & (first <= 0x39) | np.isin(hashes, _number_words())
    masked = np.where(number, np.uint64(7), hashes)
    # "3.50" and "4" are both one number
    masked = masked[np.concatenate([[True], ~(number[1:] & number[:-1])])] if len(masked) else masked

    def distinct(values: "np.ndarray", length: int) -> "np.ndarray":
        return np.unique(stretch_hashes(values, max(1, min(length, len(values)))))

    def whole(values: "np.ndarray") -> int:
        return int(mixed(stretch_hashes(values, len(values)))[0]) if len(values) else 0

    stretches = distinct(hashes, ngram) if len(hashes) >= ngram else hashes[:0]
    return _Text(
        whole(hashes), whole(masked), stretches, distinct(hashes, TRIPLE), distinct(masked, TRIPLE),
        int((~number).sum()), hashes,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _number_words() -> "np.ndarray":
    return vocabulary(_NUMBER_WORDS.split())

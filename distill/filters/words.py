"""Words as arrays: what repetition, language, reflection and the near-duplicate filters all look at.

A trace of R1 has 5 to 60 kB, and a loop over its words in Python costs more than everything else together. So a
text is cut into words once, for a whole batch, in vectorised passes over its UTF-8 bytes; a word is then a number (a
64-bit hash of its bytes, ASCII case folded), and a stretch of words is one number too.

A word is a run of letters, digits and underscores; one CJK sign; or one other sign. A run longer than any word is
cut into its letters, or "aaaa…" would be one word. Nothing here fails on a text: control characters, lone
surrogates and a megabyte without a blank are cut like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from distill.records import Trace

if TYPE_CHECKING:
    import numpy as np

LONGEST_WORD = 40  # bytes
_GROUP_BYTES = 1 << 16  # what is cut in one pass: its temporary arrays (8 bytes a byte) fit the cache
_KEPT_BYTES = 1 << 22  # of texts whose words are kept for the next filter, beside the last batch's

BLANK, LETTERS, SIGN, CHARACTER, _REST = range(5)


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """The words of one text. Arrays have shape (words,)."""

    data: bytes  # the text in UTF-8
    start: "np.ndarray"  # int64, where each word begins in `data`
    end: "np.ndarray"  # int64, and where it ends (excluded)
    hash: "np.ndarray"  # uint64
    kind: "np.ndarray"  # uint8: LETTERS, SIGN or CHARACTER (CJK)
    first: "np.ndarray"  # uint8, the first byte

    def __len__(self) -> int:
        return len(self.start)

    def text(self, begin: int, stop: int) -> str:
        """Words begin..stop (excluded), one blank between each two."""
        spans = zip(self.start[begin:stop].tolist(), self.end[begin:stop].tolist(), strict=True)
        return " ".join(self.data[a:b].decode("utf-8", "replace") for a, b in spans)


_kept: dict[str, Words] = {}


def trace_words(traces: Sequence[Trace]) -> list[Words]:
    """The words of each trace's reasoning and response together; kept, since the next filter asks for the same."""
    return words_of([f"{trace['reasoning']}\n{trace['response']}" for trace in traces])


def words_of(texts: Sequence[str]) -> list[Words]:
    """The words of each text."""
    if sum(map(len, _kept)) > _KEPT_BYTES:
        _kept.clear()
    missing = [text for text in dict.fromkeys(texts) if text not in _kept]
    _kept.update(zip(missing, cut_words(missing), strict=True))
    return [_kept[text] for text in texts]


def cut_words(texts: Sequence[str]) -> list[Words]:
    """As words_of, without keeping them."""
    found: list[Words] = []
    group: list[bytes] = []
    size = 0
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        if group and size + len(data) > _GROUP_BYTES:
            found += _cut(group)
            group, size = [], 0
        group.append(data)
        size += len(data) + 1
    return found + _cut(group) if group else found


def stretch_hashes(hashes: "np.ndarray", length: int) -> "np.ndarray":
    """A hash of each stretch of `length` consecutive words; shape (max(words - length + 1, 0),).

    By differences of a running polynomial, so the cost does not depend on `length`. Two different stretches are
    equal with a chance of 2^-64 or so: never among the words of one text.
    """
    import numpy as np

    count = len(hashes) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    powers, inverse = _powers(len(hashes))
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes * powers[: len(hashes)])])
    return mixed((running[length:] - running[:-length]) * inverse[:count])


def mixed(values: "np.ndarray") -> "np.ndarray":
    """The same numbers with their bits stirred, so that any part of them is a hash."""
    import numpy as np

    values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ (values >> np.uint64(32))


def vocabulary(words: Sequence[str]) -> "np.ndarray":
    """The hashes of single words, in their order. Raises AssertionError for a text that is not one word."""
    import numpy as np

    found = cut_words(words)
    assert all(len(word) == 1 for word in found), [w for w, f in zip(words, found, strict=True) if len(f) != 1]
    return np.array([word.hash[0] for word in found], dtype=np.uint64)


def _cut(group: Sequence[bytes]) -> list[Words]:
    import numpy as np

    data = b"\n".join(group)
    signs = np.frombuffer(data, dtype=np.uint8)
    kind = _kinds(signs)
    before = np.empty_like(kind)
    before[:1], before[1:] = BLANK, kind[:-1]
    letters = kind == LETTERS
    begins = (kind == SIGN) | (kind == CHARACTER) | ((letters | (kind == BLANK)) & (before != kind))
    start = np.flatnonzero(begins)
    end = np.append(start[1:], len(signs))
    long = np.flatnonzero((end - start > LONGEST_WORD) & letters[start])
    if len(long):
        inside = np.zeros(len(signs) + 1, dtype=np.int8)
        inside[start[long]] = 1
        inside[end[long]] -= 1
        begins |= (np.cumsum(inside[:-1]) > 0) & ((signs & 0xC0) != 0x80)
        start = np.flatnonzero(begins)
        end = np.append(start[1:], len(signs))
    word = kind[start] != BLANK
    start, end = start[word], end[word]
    powers, inverse = _powers(len(signs))
    running = np.empty(len(signs) + 1, dtype=np.uint64)
    running[0] = 0
    np.cumsum(_byte_codes().take(signs) * powers[: len(signs)], out=running[1:])
    hashes = mixed((running[end] - running[start]) * inverse[start])
    kind, first = kind[start], signs[start]
    offsets = np.concatenate([[0], np.cumsum([len(text) + 1 for text in group])])
    rows = np.searchsorted(start, offsets).tolist()
    return [
        Words(text, start[a:b] - offset, end[a:b] - offset, hashes[a:b], kind[a:b], first[a:b])
        for text, offset, a, b in zip(group, offsets.tolist(), rows, rows[1:], strict=False)
    ]


def _kinds(signs: "np.ndarray") -> "np.ndarray":
    """Of each byte: what word it begins or goes on. A later byte of a letter counts as a letter, others as _REST."""
    import numpy as np

    kind = _byte_kinds().take(signs)
    later = np.flatnonzero(kind == _REST)
    if len(later):
        later = later[later > 0]
        for _ in range(3):  # a character has up to three later bytes
            kind[later] = np.where(kind[later - 1] == LETTERS, LETTERS, _REST)
    return kind


@lru_cache(maxsize=1)
def _byte_kinds() -> "np.ndarray":
    import numpy as np

    kinds = np.full(256, SIGN, dtype=np.uint8)
    kinds[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = BLANK
    for low, high in ("09", "AZ", "az", "__"):
        kinds[ord(low) : ord(high) + 1] = LETTERS
    kinds[0x80:0xC0] = _REST
    kinds[0xC3:0xE2] = LETTERS  # Latin, Greek, Cyrillic, Hebrew, Arabic, the scripts of India, Thai, ...
    kinds[0xE3:0xEE] = CHARACTER  # CJK, kana, hangul; E2 and above are signs and emoji
    return kinds


@lru_cache(maxsize=1)
def _byte_codes() -> "np.ndarray":
    """A fixed random number for each byte; upper and lower case of ASCII share theirs."""
    import numpy as np

    codes = mixed(np.arange(1, 257, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    codes[ord("A") : ord("Z") + 1] = codes[ord("a") : ord("z") + 1]
    return codes


_BASE = 0xD1342543DE82EF95  # odd, so that it has an inverse modulo 2^64


def _powers(count: int) -> "tuple[np.ndarray, np.ndarray]":
    """At least `count` powers of the base and of its inverse, modulo 2^64."""
    size = _GROUP_BYTES + 1
    while size < count:
        size *= 2
    return _power_tables(size)


@lru_cache(maxsize=2)
def _power_tables(size: int) -> "tuple[np.ndarray, np.ndarray]":
    import numpy as np

    tables = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        steps = np.full(size, base, dtype=np.uint64)
        steps[0] = 1
        tables.append(np.cumprod(steps))
    return tables[0], tables[1]

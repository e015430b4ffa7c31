"""Near-duplicates of up to millions of texts: MinHash sketches and the pairs that a banded index (LSH) proposes.

The sketches are rensa's (R-MinHash, exact in expectation: the share of equal slots is the Jaccard similarity of the
two sets of word stretches, with a standard deviation of 0.035 at 128 slots). Each slot keeps 16 bits, 256 bytes a
text, in a file, and the index is one sort a band over a column of it, so that a million texts take bounded memory
where an index of hash tables takes gigabytes. Measured against datasketch in tests/bench/filters.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill.filters.words import Words, stretch_hashes

if TYPE_CHECKING:
    import numpy as np

SLOTS = 128
WIDTH = 2 * SLOTS  # bytes
_SEED = 1
_CHUNK = 1 << 14  # pairs verified at once


def sketches(texts: Sequence[Words], ngram: int) -> "np.ndarray":
    """uint8 of shape (texts, WIDTH). A text shorter than `ngram` words is one stretch; an empty one is all zeros."""
    import numpy as np
    from rensa import RMinHash

    if not texts:
        return np.zeros((0, WIDTH), dtype=np.uint8)
    stretches = [stretch_hashes(words.hash, max(1, min(ngram, len(words)))) for words in texts]
    offsets = np.concatenate([[0], np.cumsum([len(found) for found in stretches])]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(stretches), offsets, SLOTS, _SEED)
    found = (np.array(matrix.to_rows(), dtype=np.uint32) & 0xFFFF).astype("<u2")
    found[np.diff(offsets.astype(np.int64)) == 0] = 0
    return found.view(np.uint8).reshape(len(texts), WIDTH)


def first_of_each(payload: "np.ndarray", order: "np.ndarray", similarity: float) -> "np.ndarray":
    """Of each text the one that is kept in its stead, or itself; int64 of shape (len(payload),).

    `order` lists the texts to compare (numbers of rows), those to be kept first. Texts are tied to the first of those
    that they resemble, and so on, so that each cluster keeps one. Rows that `order` leaves out stand for themselves.
    """
    import numpy as np

    best = np.arange(len(order))  # in places of `order`: the first text that is alike
    slots = payload.view("<u2")
    for band in range(SLOTS // _per_band(similarity)):
        keys = _band(slots, band, _per_band(similarity))[order]
        ranked = np.argsort(keys, kind="stable")
        same = keys[ranked[1:]] == keys[ranked[:-1]]
        if not same.any():
            continue
        begins = np.concatenate([[True], ~same])
        leaders = ranked[np.maximum.accumulate(np.where(begins, np.arange(len(ranked)), 0))]
        for others in (leaders[1:], ranked[:-1]):  # a group's first text, and the one just before
            later, earlier = ranked[1:][same], others[same]
            _tie(best, slots, order, later, earlier, similarity)
    for place in np.flatnonzero(best != np.arange(len(best))).tolist():  # in order: what came before is settled
        best[place] = best[best[place]]
    kept = np.arange(len(payload))
    kept[order] = order[best]
    return kept


def _per_band(similarity: float) -> int:
    """Slots a band: pairs at the threshold are proposed with a chance above 99.9%."""
    return 8 if similarity >= 0.9 else 4 if similarity >= 0.65 else 2


def _band(slots: "np.ndarray", band: int, size: int) -> "np.ndarray":
    """A key of each text's slots of a band."""
    import numpy as np

    columns = np.ascontiguousarray(slots[:, band * size : (band + 1) * size])
    keys = columns.view(f"<u{2 * min(size, 4)}")
    return keys[:, 0] if keys.shape[1] == 1 else keys[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ keys[:, 1]


def _tie(
    best: "np.ndarray",
    slots: "np.ndarray",
    order: "np.ndarray",
    later: "np.ndarray",
    earlier: "np.ndarray",
    similarity: float,
) -> None:
    """Enter `earlier` as the text alike of `later` where it is one and comes before what is known."""
    useful = earlier < best[later]
    later, earlier = later[useful], earlier[useful]
    for start in range(0, len(later), _CHUNK):
        a, b = later[start : start + _CHUNK], earlier[start : start + _CHUNK]
        left = slots[order[a]]
        alike = (left == slots[order[b]]).mean(axis=1) >= similarity
        alike &= left.any(axis=1)  # texts without a word resemble nothing
        best[a[alike]] = b[alike]

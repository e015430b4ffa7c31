r"""Tuples, sets, lists, intervals and matrices of plain numbers, compared element by element.

The rules are math-verify's: a bare list is a set, repeated elements count once; round brackets are ordered; a tuple
may answer for a set or a list and the other way round, if it has the order of the reference; ``[a, b]`` of two is a
closed interval. Where elements are not plain numbers, only sameness is decided.
"""

import re
from dataclasses import dataclass

from evals.grading.numbers import number, same_number

ELEMENTS = 200  # of a sequence that is compared here
_MATRIX = re.compile(r"\\begin\{([pbvV]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_AMBIGUOUS = re.compile(r"\d,\d{3}(?!\d)")
_BRACKETS = {"(": ")", "[": "]"}


@dataclass(frozen=True)
class Structure:
    """kind: 'list' (bare), 'set', 'tuple', 'matrix', or the brackets of an interval with a square one: '[)'."""

    kind: str
    elements: tuple[str, ...]
    columns: int = 0


def _split(text: str) -> tuple[str, ...] | None:
    """The top-level elements; None if brackets do not balance, or a comma may be one of thousands."""
    separator = ";" if ";" in text else ","
    if separator == "," and _AMBIGUOUS.search(text):
        return None
    elements, depth, start, mixed = [], 0, 0, False
    for place, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif character == separator and not depth:
            elements.append(text[start:place])
            start = place + 1
        elif character == "," and not depth:
            mixed = True  # (1,2, 3): with a space after some commas only
    elements.append(text[start:])
    if mixed and any("," in element and number(element) is None for element in elements):
        return None
    whole = depth == 0 and len(elements) <= ELEMENTS and all(elements)
    return tuple(elements) if whole else None


def structure(text: str) -> Structure | None:
    """A normalised text as a sequence, or None if it is none."""
    if match := _MATRIX.fullmatch(text):
        body = match.group(2)
        if "\\begin" in body:
            return None
        rows = [row.split("&") for row in body.removesuffix("\\\\").split("\\\\")]
        cells = tuple(cell for row in rows for cell in row)
        regular = len({len(row) for row in rows}) == 1 and all(cells) and len(cells) <= ELEMENTS
        kind = "det" if match.group(1) in ("vmatrix", "Vmatrix") else "matrix"
        return Structure(kind, cells, len(rows[0])) if regular and kind == "matrix" else None
    if text.startswith("\\{") and text.endswith("\\}"):
        elements = _split(text[2:-2])
        return Structure("set", elements) if elements else None
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]":
        elements = _split(text[1:-1])
        if elements is None or len(elements) < 2:
            return None
        if len(elements) == 2 and text[0] + text[-1] != "()":
            return Structure(text[0] + text[-1], elements)
        return Structure("tuple", elements) if _BRACKETS[text[0]] == text[-1] else None
    if "," in text or ";" in text:
        elements = _split(text)
        return Structure("list", elements) if elements and len(elements) > 1 else None
    return None


def _same_element(a: str, b: str) -> bool | None:
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return same_number(x, y)
    return True if a == b and x is None and y is None else None


def _same_in_order(a: tuple[str, ...], b: tuple[str, ...]) -> bool | None:
    if len(a) != len(b):
        return False
    same = [_same_element(x, y) for x, y in zip(a, b, strict=True)]
    if all(same):
        return True
    numeric = all(number(x) is not None for x in (*a, *b))
    return False if numeric and False in same and None not in same else None


def _same_as_sets(a: tuple[str, ...], b: tuple[str, ...]) -> bool | None:
    if sorted(a) == sorted(b):
        return True
    x, y = [number(e) for e in a], [number(e) for e in b]
    if None in x or None in y:
        return None
    ours, theirs = {e for e in x if e is not None}, {e for e in y if e is not None}
    if ours == theirs:
        return True
    if len(ours) > 20 or len(theirs) > 20:
        return None
    certain = all(same_number(p, q) is not None for p in ours ^ theirs for q in ours | theirs)
    return False if certain else None


def _empty(interval: Structure) -> bool:
    ends = [number(element) for element in interval.elements]
    return ends[0] is not None and ends[1] is not None and ends[0] >= ends[1]


def same_structure(a: Structure, b: Structure) -> bool | None:
    """Whether answer `a` equals reference `b`, or None where that is not certain."""
    if "matrix" in (a.kind, b.kind):
        if a.kind != b.kind:
            return None
        return False if a.columns != b.columns else _same_in_order(a.elements, b.elements)
    if a.kind == b.kind:
        if a.kind[0] in "[(" and a.elements != b.elements and (_empty(a) or _empty(b)):
            return None  # [0, 0) and [0, -1) are one interval
        return (
            _same_as_sets(a.elements, b.elements)
            if a.kind in ("list", "set")
            else _same_in_order(a.elements, b.elements)
        )
    kinds = {a.kind, b.kind}
    if kinds == {"list", "set"}:
        return _same_as_sets(a.elements, b.elements)
    if kinds <= {"list", "set", "tuple"}:
        return _same_in_order(a.elements, b.elements) or None
    return None

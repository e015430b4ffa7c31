r"""The cheap exact path: equality of answers that needs no computer algebra.

Decides only what it is sure of (equal strings after removing typesetting, numbers, quantities, and tuples, sets,
intervals and matrices of these); everything else is left to math-verify by returning None.
"""

import re
import unicodedata
from fractions import Fraction

from evals.grading.numbers import number, quantity, same_number, same_quantity
from evals.grading.sequences import same_structure, structure

_INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\u00ad]")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_TO_TEXT = re.compile(r"\\(?:textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{")
# A space, in any of LaTeX's ways. A double backslash ends a row and must not be read as the start of one.
_SPACE = re.compile(r"(\\\\)|\\[,;: ]|\\q?quad(?![A-Za-z])|[~\s]")
_TYPESETTING = re.compile(
    r"(\\\\|\\\$)|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\limits|\\!|\\\(|\\\)|\\\[|\\\]"
)
_DOLLAR = re.compile(r"(?<!\\)\$")
_LIST_COMMA = re.compile(r"[,;] +")
_MIXED_SPACE = re.compile(r"(?<![\d.,/])(\d{1,50}) +(?=\d{1,50}/\d)")
_THOUSANDS_SPACE = re.compile(r"(?<![\d.,/ ])\d{1,3}(?: \d{3})+(?![\d/ ]|,\d)")
_LETTER = re.compile(r"(?:\(([A-Z])\)|([A-Z]))")
_AMBIGUOUS = re.compile(r"\d,\d{3}(?!\d)")
_NO_MATTER = re.compile(r"(?<!\d) +| +(?!\d)")  # a space between two digits is none of these: 2 1 is not 21
# What says that an answer is no single number, of which computer algebra would read one all the same.
_SEVERAL = re.compile(
    r"\\(?:neq?|not|[lg]eq?|[lg]t|[lg]eqslant|lor|land|vee|wedge)(?![A-Za-z])|[≠≤≥∨∧<]|!=|(?<![=-])>|//"
    r"|\b(?:or|at (?:least|most))\b"
)
_DOTS = re.compile(r"\\[lc]?dots(?![A-Za-z])|\.\.\.|…")
_HALF_OF_DAY = re.compile(r"(?<![A-Za-z])([ap])\.?m\b", re.IGNORECASE)
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_IN_BASE = re.compile(r"0*([0-9A-Z]+)_\{?(\d{1,2}|[a-z]{3,5})\}?")
_OPTION = re.compile(r"\(([A-Z])\)[-$\d\\][^,;()A-Z]*")
_PROSE = 200  # characters from which on words like "or" are part of a text that ends with the answer
_SIGNS = str.maketrans(
    {
        character: f"\\frac{{{top}}}{{{bottom}}}"
        for character, top, bottom in zip("½⅓⅔¼¾⅕⅛", "1121311", "2334458", strict=True)
    }
    | {"²": "^2", "³": "^3", "\u2212": "-", "∅": "\\emptyset"}
)


def _spaced(answer: str) -> str:
    r"""The text with one kind of space, of fraction and of text wrapper, and thousands in one piece."""
    text = _INVISIBLE.sub("", answer).translate(_SIGNS).replace("{,}", ",").strip()
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cfrac", "\\frac")
    text = text.replace("\\varnothing", "\\emptyset")
    text = _TYPESETTING.sub(r"\1", text)
    if len(_DOLLAR.findall(text)) % 2 == 0:  # mathematics; a single one is money
        text = _DOLLAR.sub("", text).strip()
    text = _SPACE.sub(lambda match: match.group(1) or " ", text)
    text = _TO_TEXT.sub(r"\\text{", text)
    text = _MIXED_SPACE.sub(r"\1_", text)
    return _THOUSANDS_SPACE.sub(lambda match: match.group().replace(" ", ""), text)


def _compact(spaced: str) -> str:
    """Without spaces but between digits; a comma and a space become ';', which separates a list and no thousands."""
    return _NO_MATTER.sub("", _LIST_COMMA.sub(";", spaced)).rstrip(".")


def normalise(answer: str) -> str:
    r"""An answer without invisible characters, typesetting, text wrappers and spaces; never longer than the input."""
    if answer.isascii() and answer.isalnum():  # a whole number, a letter: nothing to remove
        return answer
    return _compact(_WRAPPER.sub(r"\1", _spaced(answer)).replace("\\%", "%").replace("\\$", ""))


def value(answer: str) -> Fraction | None:
    r"""The number that an answer states, whatever it is measured in: 5 of x = 5, \$5 and 5 apples; else None."""
    found = quantity(_units_kept(answer))
    if found is None:
        return number(normalise(answer))
    return found.value * int(found.unit[1:]) if found.unit.startswith("×") else found.value


def plain_string(answer: str) -> str:
    """An answer for the `exact` kind: NFC, text wrappers removed, whitespace collapsed, case kept."""
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", answer))
    return " ".join(_WRAPPER.sub(r"\1", text).split())


def exactly_equal(answer: str, reference: str) -> bool | None:
    """True or False where that is certain without computer algebra, else None.

    Two numbers closer than 1e-5 but not equal (0.333333 against 1/3) are left to math-verify's rounding rule.
    """
    ours, theirs = normalise(answer), normalise(reference)
    a, b = number(ours), number(theirs)
    if a is not None and b is not None:
        return same_number(a, b)
    if b is not None and len(answer) <= _PROSE and _SEVERAL.search(answer):
        return False
    if a is None and b is None and ours and _same_text(ours, theirs):
        return True
    if theirs.startswith("(") and (stated := _LETTER.fullmatch(ours)) and (letter := _LETTER.fullmatch(theirs)):
        return (stated[1] or stated[2]) == letter[1]  # B against \text{(B)}
    if (letter := _LETTER.fullmatch(theirs)) and letter[1] and (stated := _OPTION.fullmatch(ours)):
        return stated[1] == letter[1]  # \textbf{(B)}\ 5 against \text{(B)}
    if (a_base := _IN_BASE.fullmatch(ours)) and (b_base := _IN_BASE.fullmatch(theirs)):
        return _in_base(a_base) == _in_base(b_base)
    if _another_meaning(ours, theirs):
        return False
    mine, wanted = _units_kept(answer), _units_kept(reference)
    measured, measure = quantity(mine), quantity(wanted)
    if measured is None and measure is not None and measure.unit:
        measured = quantity(mine, any_unit=True)
    elif measure is None and measured is not None and measured.unit:
        measure = quantity(wanted, any_unit=True)
    if measured is not None and measure is not None:
        return same_quantity(measured, measure)
    if measured is not None or measure is not None:
        return None
    first, second = structure(ours), structure(theirs)
    return same_structure(first, second) if first is not None and second is not None else None


def _in_base(match: re.Match[str]) -> tuple[str, str]:
    return match[1], _BASES.get(match[2], match[2])


def _another_meaning(ours: str, theirs: str) -> bool:
    """Differences that computer algebra does not see: between a.m. and p.m., and a list that goes on."""
    half, other = _HALF_OF_DAY.search(ours), _HALF_OF_DAY.search(theirs)
    if half and other and half[1].lower() != other[1].lower():
        return True
    if len(ours) > _PROSE:  # a text may show a list on the way to its answer
        return False
    return bool(_DOTS.search(ours)) and not _DOTS.search(theirs) and ("," in ours or ";" in ours)


def _same_text(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    if ours.replace(";", ",") == theirs.replace(";", ","):
        return not _AMBIGUOUS.search(ours) and not _AMBIGUOUS.search(theirs)
    # \text{Evelyn} and evelyn; single letters may be variables
    return len(theirs) > 1 and theirs.isalpha() and ours.isalpha() and ours.casefold() == theirs.casefold()


def _units_kept(answer: str) -> str:
    r"""Normalised, but with \text wrappers and the spaces inside them."""
    spaced, parts, end = _spaced(answer), [], 0
    for wrapper in _WRAPPER.finditer(spaced):
        words = wrapper.group(1).strip()
        parts += [_compact(spaced[end : wrapper.start()]), "\\text{" + words + "}" if words else ""]
        end = wrapper.end()
    return "".join(parts) + _compact(spaced[end:])

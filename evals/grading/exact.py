r"""The cheap exact path: equality of answers that needs no computer algebra.

Decides only what it is sure of (equal strings after removing typesetting, two plain numbers); everything else is left
to math-verify by returning None.
"""

import re
import unicodedata
from fractions import Fraction

_INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\u00ad]")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_TYPESETTING = re.compile(r"\\left|\\right|\\displaystyle|\\[,;:! ]|\\\(|\\\)|\\\[|\\\]|[$~\s]")
_INTEGER = re.compile(r"[+-]?(?:\d{1,400}|\d{1,3}(?:,\d{3}){1,100})")
_DECIMAL = re.compile(r"([+-]?)(\d{0,400}|\d{1,3}(?:,\d{3}){1,100})\.(\d{0,400})")
_FRACTION = re.compile(r"([+-]?)(?:(\d{1,400})/(\d{1,400})|\\frac\{([+-]?\d{1,400})\}\{(\d{1,400})\}|\\frac(\d)(\d))")
_CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*(?:[).:]|$)")


def normalise(answer: str) -> str:
    r"""An answer without invisible characters, typesetting, text wrappers and spaces; never longer than the input."""
    text = _INVISIBLE.sub("", answer).replace("\u2212", "-").replace("{,}", ",")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\%", "%")
    text = _WRAPPER.sub(r"\1", text)
    return _TYPESETTING.sub("", text).rstrip(".")


def plain_string(answer: str) -> str:
    """An answer for the `exact` kind: NFC, text wrappers removed, whitespace collapsed, case kept."""
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", answer))
    return " ".join(_WRAPPER.sub(r"\1", text).split())


def number(text: str) -> Fraction | None:
    """The exact value of a normalised integer (thousands commas allowed), decimal or simple fraction; else None."""
    if _INTEGER.fullmatch(text):
        return Fraction(int(text.replace(",", "")))
    if match := _DECIMAL.fullmatch(text):
        sign, whole, part = match.groups()
        if not whole and not part:
            return None
        value = Fraction(int((whole.replace(",", "") + part) or "0"), 10 ** len(part))
        return -value if sign == "-" else value
    if match := _FRACTION.fullmatch(text):
        sign, *pairs = match.groups()
        top, bottom = (part for part in pairs if part is not None)
        if int(bottom) == 0:
            return None
        value = Fraction(int(top), int(bottom))
        return -value if sign == "-" else value
    return None


def exactly_equal(answer: str, reference: str) -> bool | None:
    """True or False where that is certain without computer algebra, else None.

    Two numbers closer than 1e-5 but not equal (0.333333 against 1/3) are left to math-verify's rounding rule.
    """
    ours, theirs = normalise(answer), normalise(reference)
    if ours == theirs and ours:
        return True
    if len(theirs) > 1 and theirs.isalpha() and ours.isalpha() and ours.casefold() == theirs.casefold():
        return True  # \text{Evelyn} and evelyn; single letters may be variables
    a, b = number(ours), number(theirs)
    if a is None or b is None:
        return None
    if a == b:
        return True
    return None if abs(a - b) <= max(Fraction(1), abs(b)) / 100_000 else False


def choice_letter(answer: str) -> str | None:
    r"""'B' from B, (b), B. text, \text{(B)}; None if the answer is no single letter with or without its text."""
    match = _CHOICE.match(plain_string(answer).strip("$ "))
    return match.group(1).upper() if match else None

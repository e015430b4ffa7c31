r"""Plain numbers and quantities in final answers, as exact fractions.

A quantity is a number with what people write around it: a currency sign, a per cent sign, a unit, ``x =``, or a word
such as million. Nothing is evaluated: every form is one regular expression, and digits are bounded.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

DIGITS = 400  # of a number that is read; int() of a megabyte of digits is slow
_N = rf"\d{{1,{DIGITS}}}"
_INTEGER = re.compile(rf"[+-]?(?:{_N}|[1-9]\d{{0,2}}(?:,\d{{3}}){{1,100}})")
_DECIMAL = re.compile(rf"([+-]?)(\d{{0,{DIGITS}}}|[1-9]\d{{0,2}}(?:,\d{{3}}){{1,100}})\.(\d{{0,{DIGITS}}})")
_FRACTION = re.compile(
    rf"([+-]?)(?:({_N})/({_N})|\\frac\{{([+-]?{_N})\}}\{{([+-]?{_N})\}}|\\frac(\d)(\d)"
    rf"|\\frac\{{({_N})\}}(\d)|\\frac(\d)\{{({_N})\}})"
)
_MIXED = re.compile(r"([+-]?)(\d{1,50})(?:\\frac\{(\d{1,50})\}\{(\d{1,50})\}|\\frac(\d)(\d)|_(\d{1,50})/(\d{1,50}))")
_REPEATING = re.compile(r"([+-]?)(\d{0,50})\.(\d{0,50})\\(?:overline|bar)\{(\d{1,50})\}")
_POWER = re.compile(r"(?:([+-]?[\d.,]{1,40})(?:\\times|\\cdot|×))?([+-]?)(\d{1,4})\^(?:\{([+-]?\d{1,2})\}|(\d))")

# As programs print it. 2e-1 may be twice Euler's number less one, so a sign wants a decimal point.
_SCIENTIFIC = re.compile(r"([+-]?\d{1,40}(?:\.\d{1,40})?)[eE](\d{1,2})|([+-]?\d{1,40}\.\d{1,40})[eE]([+-]\d{1,2})")

_VARIABLE = re.compile(r"([A-Za-z](?:_\{?[A-Za-z0-9]\}?)?)=(?!.*=)")
_MONEY = re.compile(r"^([+-]?)(?:\\\$|\$|€|£|\\pounds|USD)")
_CENT = re.compile(r"(?:\\?%|\\text\{(?:\\?%|percent|percentpoints)\}|(?<=\d)percent)$", re.IGNORECASE)
_DEGREE = re.compile(r"(?:\^\{?\\circ\}?|\\degrees?|°)(?:\\text\{)?([CF]?)\}?$")
_BRACED = re.compile(r"\\text\{([^{}\\]{1,60})\}(?:\^\{?([23])\}?)?\.?$")
_BARE = re.compile(r"(?<=[\d}])([A-Za-z]{1,20})$")

# Words that change the number rather than measure it.
_SCALES = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_RAISED = re.compile(r"(?:(sq|square|cu|cubic) ([a-z]+)|([a-z]+)([23]))")
_NOT_UNITS = re.compile(r"\d|\b(?:and|or|to|than|half|pair|pairs|score|base|no|not|if|over|quarters?|thirds?)\b")

# Unit: (dimension, size in the dimension's base unit). Only where one name has one meaning.
_TABLE = {
    "length": {"mm": "1/1000", "cm": "1/100", "m": "1", "meter": "1", "metre": "1", "km": "1000", "kilometer": "1000",
               "centimeter": "1/100", "millimeter": "1/1000", "inch": "127/5000", "feet": "381/1250", "ft": "381/1250",
               "foot": "381/1250", "yard": "1143/1250", "mile": "201168/125", "mi": "201168/125"},
    "time": {"s": "1", "second": "1", "sec": "1", "minute": "60", "min": "60",
             "hour": "3600", "hr": "3600", "h": "3600", "day": "86400", "week": "604800"},
    "mass": {"mg": "1/1000", "g": "1", "gram": "1", "kg": "1000", "kilogram": "1000", "pound": "45359237/100000",
             "lb": "45359237/100000", "ounce": "45359237/1600000"},
    "length^3": {"ml": "1/1000000", "milliliter": "1/1000000", "l": "1/1000", "liter": "1/1000", "litre": "1/1000"},
    "money": {"cent": "1/100", "dollar": "1"},
}  # fmt: skip
_UNITS = {name: (kind, Fraction(size)) for kind, names in _TABLE.items() for name, size in names.items()}
# Written without \text, a word is a unit only if it is one of these; anything else may be a product of variables.
_WORDS = {n for n in _UNITS if len(n) > 1} | {
    "apple", "mph", "degree", "unit", "student", "month", "year", "gallon", "acre", "coin", "mark", "square",
}  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """A number, and '' or what it is measured in: '%', '°', a unit's name, or '×1000' for a word like thousand."""

    value: Fraction
    unit: str
    variable: str = ""


def number(text: str) -> Fraction | None:
    r"""The exact value of a normalised integer, decimal, fraction, mixed number, m × 10^n or 1e5; else None.

    Thousands commas are allowed. ``_`` joins the whole and the fraction of a mixed number written with a space.
    """
    if _INTEGER.fullmatch(text):
        return Fraction(int(text.replace(",", "")))
    if match := _DECIMAL.fullmatch(text):
        sign, whole, part = match.groups()
        if not whole and not part:
            return None
        value = Fraction(int((whole.replace(",", "") + part) or "0"), 10 ** len(part))
        return -value if sign == "-" else value
    if match := _SCIENTIFIC.fullmatch(text):
        return Fraction(match[1] or match[3]) * Fraction(10) ** int(match[2] or match[4])
    if "/" not in text and "\\" not in text and "^" not in text:
        return None
    if match := _REPEATING.fullmatch(text):  # 0.1\overline{6}
        sign, whole, part, period = match.groups()
        nines = 10 ** len(part) * (10 ** len(period) - 1)
        value = Fraction(int(whole + part + period) - int(whole + part or "0"), nines)
        return -value if sign == "-" else value
    if match := _FRACTION.fullmatch(text):
        sign, *pairs = match.groups()
        top, bottom = (part for part in pairs if part is not None)
        if int(bottom) == 0:
            return None
        value = Fraction(int(top), int(bottom))
        return -value if sign == "-" else value
    if match := _MIXED.fullmatch(text):
        sign, whole, *pairs = match.groups()
        top, bottom = (int(part) for part in pairs if part is not None)
        if bottom == 0:
            return None
        value = int(whole) + Fraction(top, bottom)
        return -value if sign == "-" else value
    if match := _POWER.fullmatch(text):
        factor, sign, base, braced, digit = match.groups()
        scale = number(factor) if factor else Fraction(1)
        exponent = int(braced or digit)
        if scale is None or (factor and (base != "10" or sign)) or (int(base) == 0 and exponent <= 0):
            return None
        power = Fraction(int(base)) ** exponent
        return scale * (-power if sign == "-" else power)
    return None


def _unit_name(words: str) -> str | None:
    words = " ".join(words.lower().replace(".", "").split())
    if _NOT_UNITS.search(words):
        return None
    if words in _SCALES:
        return f"×{_SCALES[words]}"
    if any(word.rstrip("s") in _SCALES for word in words.split()):
        return None  # "million dollars" is both: left to computer algebra
    if words.endswith("inches"):
        return words.removesuffix("es")
    return words[:-1] if len(words) > 2 and words.endswith("s") and not words.endswith(("ss", "/s")) else words


def _measure(name: str) -> tuple[str, Fraction] | None:
    """(dimension, size in its base unit) of a unit, of its square or cube, and of a rate: m2, square meter, km/h."""
    if name == "mph":
        name = "mile/hour"
    top, _, bottom = name.replace(" per ", "/").replace(" / ", "/").partition("/")
    if bottom:
        over, under = _measure(top.removesuffix("s") if len(top) > 2 else top), _measure(bottom)
        return (f"{over[0]}/{under[0]}", over[1] / under[1]) if over and under else None
    power = 1
    if match := _RAISED.fullmatch(name):
        name, power = match[2] or match[3], int(match[4] or (2 if match[1].startswith("sq") else 3))
    if name not in _UNITS:
        return None
    dimension, size = _UNITS[name]
    return (f"{dimension}^{power}" if power > 1 else dimension), size**power


def quantity(text: str, any_unit: bool = False) -> Quantity | None:
    r"""A normalised text (its \text wrappers kept, spaces only inside them) as a number with its unit, or None.

    any_unit: a bare m or g is one too; for an answer to a reference with a unit.
    """
    variable = ""
    if match := _VARIABLE.match(text):
        variable, text = match.group(1), text[match.end() :]
    unit = ""
    if match := _MONEY.match(text):
        unit, text = "dollar", match.group(1) + text[match.end() :]
    elif match := _CENT.search(text):
        unit, text = "%", text[: match.start()]
    elif match := _DEGREE.search(text):
        unit, text = "°" + match.group(1), text[: match.start()]
    elif match := _BRACED.search(text):
        name = _unit_name(match.group(1))
        if name is None:
            return None
        unit, text = name + (match.group(2) or ""), text[: match.start()]
    elif match := _BARE.search(text):
        name = _unit_name(match.group(1))
        if name is None or (name not in (_UNITS if any_unit else _WORDS) and not name.startswith("×")):
            return None
        unit, text = name, text[: match.start()]
    value = number(text)
    return None if value is None else Quantity(value, unit, variable)


def close(a: Fraction, b: Fraction) -> bool:
    """Nearer than a ten-thousandth of a per cent, so that rounding may make them one."""
    return abs(a - b) <= max(Fraction(1), abs(b)) / 100_000


def same_number(a: Fraction, b: Fraction) -> bool | None:
    """None for two numbers that rounding may make one (0.333333 and 1/3): math-verify has the rule for these."""
    if a == b:
        return True
    if a.denominator == b.denominator == 1:
        return False
    return None if close(a, b) else False


def same_quantity(a: Quantity, b: Quantity) -> bool | None:
    r"""Whether two quantities are one, or None where that is not certain.

    A missing unit or variable is no difference (the problem names it). ``50\%`` is 50 (asked for per cent) and 0.5;
    ``5 million`` is 5000000, and left open against 5.
    """
    if a.variable and b.variable and a.variable != b.variable:
        return None
    if a.unit == b.unit:
        return same_number(a.value, b.value)
    for scaled, other in ((a, b), (b, a)):
        if other.unit:
            continue
        if scaled.unit == "%":
            if other.value in (scaled.value, scaled.value / 100):
                return True
            near = close(scaled.value, other.value) or close(scaled.value / 100, other.value)
            return None if near else False
        if scaled.unit.startswith("×"):
            whole = scaled.value * int(scaled.unit[1:])
            if whole == other.value:
                return True
            return None if close(scaled.value, other.value) or close(whole, other.value) else False
        return same_number(scaled.value, other.value)
    ours, theirs = _measure(a.unit), _measure(b.unit)
    if ours is None or theirs is None:
        return None
    if ours[0] != theirs[0]:
        return None if {"pound", "ounce"} & {a.unit, b.unit} else False  # which are money and volume too
    return same_number(a.value * ours[1], b.value * theirs[1])

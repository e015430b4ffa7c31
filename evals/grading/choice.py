r"""Multiple choice: the letter, however it is stated; the option's text where the reference has it.

A reference is a letter ("B", "(B)", "B. blue"), several ("A, C"), or JSON {"answer": "B", "options": ["red", "blue"]}.
"""

import json
import re
import string

from evals.grading.exact import plain_string

MAX_CHARACTERS = 2000
_ONE = re.compile(r"\(?\s*([A-Za-z])\s*(?:[).:]|$)")
_SEVERAL = re.compile(r"\(?([A-Z])\)?(?:(?:\s?(?:,|;|&|/|and))+\s?\(?[A-Z]\)?)+")
_OR_ANOTHER = re.compile(r"[).:]?\s*,?\s*n?or\s+\(?[A-Z](?:[).:,\s]|$)")
_WORDS = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:option|answer|choice)\s*(?:is)?\s*:?\s*)+", re.IGNORECASE
)
_AFTER_LETTER = re.compile(r"\(?\s*[A-Za-z]\s*[).:]\s*(.+)", re.DOTALL)


def choice_letter(answer: str) -> str | None:
    r"""'B' from B, (b), B. text, Option B, \text{(B)}, or 'AC' from A, C; None if the answer states no letter."""
    text = plain_string(answer).strip("$*` ")
    words = _WORDS.match(text)
    text = text[words.end() :].lstrip("*$ ") if words else text
    if _SEVERAL.fullmatch(text.rstrip(". ")):
        return "".join(sorted(set(re.findall(r"\b[A-Z]\b", text))))
    match = _ONE.match(text.rstrip("*$ "))
    if match is None or _OR_ANOTHER.match(text, match.end(1)):  # (A) or (B)
        return None
    return match.group(1).upper()


def _text(answer: str) -> str:
    return plain_string(answer).strip("$*. ").casefold()


def _options(reference: str) -> tuple[str, dict[str, str]]:
    """(the answer, letter → text)."""
    if reference.lstrip().startswith("{"):
        try:
            row = json.loads(reference)
            options = row["options"]
            pairs = options.items() if isinstance(options, dict) else zip(string.ascii_uppercase, options, strict=False)
            return str(row["answer"]), {str(letter).upper(): _text(str(text)) for letter, text in pairs}
        except (ValueError, KeyError, TypeError, AttributeError):
            return reference, {}
    letter, behind = choice_letter(reference), _AFTER_LETTER.fullmatch(plain_string(reference))
    return reference, {letter: _text(behind.group(1))} if letter and behind else {}


def grade_choice(extracted: str, reference: str) -> tuple[str, str]:
    """(verdict, reason) of a stated choice."""
    stated, options = _options(reference)
    expected = choice_letter(stated)
    if expected is None:
        by_text = [letter for letter, text in options.items() if text == _text(stated)]
        expected = by_text[0] if len(by_text) == 1 else None
    if expected is None:
        return "unverifiable", f"the reference {reference[:40]!r} is not a choice letter"
    if len(extracted) > MAX_CHARACTERS:
        return "wrong", f"{len(extracted)} characters are no choice"
    by_text = [letter for letter, text in options.items() if text and text == _text(extracted)]
    letter = by_text[0] if len(by_text) == 1 else choice_letter(extracted)
    if letter is None:
        return "wrong", "no choice letter"
    return ("correct", "equal") if letter == expected else ("wrong", "another choice")

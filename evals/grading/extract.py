r"""Where a response states its final answer: the last ``\boxed{...}`` after the reasoning.

Everything here is one pass without recursion, because the text is model output: megabytes of opening braces must cost
no more than megabytes of prose.
"""

import re

_TOKEN = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)
_WHOLE_BOX = re.compile(r"\s*\\f?boxed\s*\{(.*)\}\s*", re.DOTALL)
_CHOICE_LINE = re.compile(r"answer(?:\s+is)?\s*[:：]?\s*(?:\*\*|\$|\\text\{)*\s*\(?\s*([A-Z])\b\s*\)?", re.IGNORECASE)

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def after_reasoning(text: str) -> str:
    """The part of a response that may state the final answer.

    After the last ``</think>``; nothing while an opened ``<think>`` is not closed; the whole text if it has neither
    tag (a trace's ``response`` field, or a model that does not reason in tags).
    """
    if THINK_CLOSE in text:
        return text.rsplit(THINK_CLOSE, 1)[1]
    return "" if THINK_OPEN in text else text


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` (or ``\fbox``-like ``\fboxed``) whose braces balance, or None."""
    if "boxed" not in text:
        return None
    open_braces: list[int] = []  # content start of an open box, or -1 for a plain brace
    found: str | None = None
    for token in _TOKEN.finditer(text):
        if token.group() == "{":
            open_braces.append(-1)
        elif token.group() == "}":
            start = open_braces.pop() if open_braces else -1
            if start >= 0:
                found = text[start : token.start()]
        elif token.group().endswith("{") and len(token.group()) > 2:
            open_braces.append(token.end())
    for _ in range(3):  # \boxed{\boxed{5}}
        inner = _WHOLE_BOX.fullmatch(found) if found else None
        if inner is None:
            break
        found = inner.group(1)
    return found


def extract_answer(text: str, kind: str = "math") -> str | None:
    r"""Final answer of a response as written, stripped, or None if it states none.

    Only the choice kind also accepts a closing "Answer: B", as published multiple-choice prompts ask for that form.
    """
    tail = after_reasoning(text)
    boxed = last_boxed(tail)
    if boxed is not None:
        return boxed.strip()
    if kind == "choice":
        lines = _CHOICE_LINE.findall(tail[-2000:])
        return lines[-1].upper() if lines else None
    return None

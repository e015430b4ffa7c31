r"""Where a response states its final answer: the last ``\boxed{...}`` after the reasoning, or the last code block.

Everything here is one pass without recursion, because the text is model output: megabytes of opening braces must cost
no more than megabytes of prose.
"""

import re

# What opens and closes boxes. A run is one token: a megabyte of braces must not be a million steps.
_TOKEN = re.compile(r"\\f?boxed\s*\{|(?:\\\\)+|\\[{}]|(?:\{[^{}\\]*\})+|\{+|\}+")
_WHOLE_BOX = re.compile(r"\s*\\f?boxed\s*\{(.*)\}\s*", re.DOTALL)
_BETWEEN = re.compile(r"(?:[\s,;$.]|\\[()\[\],;! ]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b)*")
_CHOICE_LINE = re.compile(
    r"(?i:answer|choice|option)(?i:\s+is)?\s*[:：]?\s*(?i:option\s+)?(?:\*\*|\$|\\text\{|\\\()*\s*"
    r"(?:\(([A-Za-z])\)|([A-Z])\b(?!\s+[a-z])(?!')|([A-Z])(?=\s+(?:because|since|as|is|which)\b)|([a-z])(?=[.*\s]*$))",
    re.MULTILINE,
)
_CHOICE_ALONE = re.compile(r"(?:\*\*|\$)*\(?([A-Z])\)?(?:\*\*|\$)*\.?")

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def after_reasoning(text: str) -> str:
    """The part of a response that may state the final answer.

    After the last ``</think>``; nothing while an opened ``<think>`` is not closed; the whole text if it has neither
    tag (a trace's ``response`` field, or a model that does not reason in tags).
    """
    if THINK_CLOSE in text:
        return text.rsplit(THINK_CLOSE, 1)[1]
    return "" if THINK_OPEN in text else text


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each outermost ``\boxed{...}`` (or ``\fboxed``) whose braces balance, in order."""
    first = text.find("boxed")
    if first < 0:
        return []
    while first and text[first - 1] in "f\\":  # whether the command's backslash is itself escaped
        first -= 1
    open_boxes: list[tuple[int, int, int]] = []  # start of the command, of the content; plain braces open around it
    depth = 0  # plain braces open in the innermost open box
    found: list[tuple[int, int, int]] = []  # start, start and end of the content
    for match in _TOKEN.finditer(text, first):  # braces before a box close behind it, if at all
        token = match.group()
        if token[0] == "\\":
            if len(token) > 2 and token[-1] == "{":
                open_boxes.append((match.start(), match.end(), depth))
                depth = 0
        elif token[-1] == "{":
            depth += len(token)
        elif token[0] == "}":
            place = match.start() + depth
            depth = max(0, depth - len(token))
            while place < match.end() and open_boxes:
                start, content, depth = open_boxes.pop()
                while found and found[-1][0] > start:  # the outer box counts
                    found.pop()
                found.append((start, content, place))
                plain = min(depth, match.end() - place - 1)
                place, depth = place + 1 + plain, depth - plain
    return [(start, end + 1, text[content:end]) for start, content, end in found]


def last_boxed(text: str) -> str | None:
    r"""The last box, or the last few if nothing but commas, 'and' or 'or' stands between them, joined by ", "."""
    found = boxes(text)
    if not found:
        return None
    parts = [_unwrapped(found[-1][2])]
    for (_, end, content), (start, _, _) in zip(found[-2::-1], found[:0:-1], strict=False):
        if start - end > 40 or _BETWEEN.fullmatch(text, end, start) is None or len(parts) >= 20:
            break
        parts.append(_unwrapped(content))
    parts = list(dict.fromkeys(part.strip() for part in reversed(parts)))
    return ", ".join(parts) if len(parts) > 1 else parts[0]


def _unwrapped(content: str) -> str:
    for _ in range(3):  # \boxed{\boxed{5}}
        inner = _WHOLE_BOX.fullmatch(content)
        if inner is None:
            break
        content = inner.group(1)
    return content


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language mark, body) of each closed ``` block; one that is opened again without closing is dropped."""
    blocks: list[tuple[str, str]] = []
    lines, mark = text.split("\n"), ""
    opened = -1
    for number, line in enumerate(lines):
        fence = line.strip()
        if not fence.startswith("```"):
            continue
        if opened >= 0 and fence == "```":
            blocks.append((mark, "\n".join(lines[opened + 1 : number]) + "\n"))
            opened = -1
        else:
            opened, mark = number, fence.strip("`").strip().lower()
    return blocks


def last_code(text: str, function: str | None = None) -> str | None:
    """The last block that may be Python: one that names `function`, else the last marked so, else the last unmarked."""
    blocks = code_blocks(text)
    python = [body for mark, body in blocks if mark in ("python", "python3", "py")]
    candidates = python or [body for mark, body in blocks if not mark]
    naming = [body for body in candidates if function and function in body]
    return (naming or candidates)[-1] if candidates else None


def extract_answer(text: str, kind: str = "math") -> str | None:
    r"""Final answer of a response as written, stripped, or None if it states none.

    The choice kind also accepts a closing "Answer: B", as published multiple-choice prompts ask for that form; the
    reasoning-gym kind also `<answer>…</answer>`, which is its own; the code kind takes a code block instead.
    """
    tail = after_reasoning(text)
    if kind == "code":
        return last_code(tail)
    boxed = last_boxed(tail)
    if boxed is not None:
        return boxed.strip()
    if kind == "choice":
        lines = list(_CHOICE_LINE.finditer(tail[-2000:]))
        if lines:
            return next(group for group in lines[-1].groups() if group).upper()
        last = next((line.strip() for line in reversed(tail[-200:].splitlines()) if line.strip()), "")
        alone = _CHOICE_ALONE.fullmatch(last)
        return alone.group(1) if alone else None
    if kind == "reasoning-gym":
        end = tail.rfind("</answer>")
        start = tail.rfind("<answer>", 0, max(0, end))
        return tail[start + len("<answer>") : end].strip() if start >= 0 else None
    return None

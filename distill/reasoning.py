"""Where the reasoning ends: the tags `<think>` and `</think>` in a reply, with or without the opening one."""

import re

OPEN, CLOSE = "<think>", "</think>"
_TAG = re.compile(r"</?think>")


def closing_tag(text: str) -> re.Match[str] | None:
    """The `</think>` that ends the reasoning, or None if the thinking never closed.

    R1's prompt opens the thinking, so the reply has no opening tag of its own; other servers repeat it.
    A reasoner that opens again inside needs as many closings: the one that brings the depth to zero
    counts, or, where none does, the last.
    """
    first = text.find(CLOSE)
    if first < 0:
        return None
    opened = text.lstrip().startswith(OPEN)
    if text.count(OPEN, 0, first) == opened:  # as nearly all are; searching for words costs a tenth of matching tags
        return _TAG.match(text, first)
    depth = 0 if opened else 1
    last = None
    for tag in _TAG.finditer(text):
        depth += 1 if tag.group() == OPEN else -1
        if tag.group() == CLOSE:
            last = tag
            if depth <= 0:
                break
    return last


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, response) of a reply, without the tags and the blank space around them.

    Everything is reasoning when the thinking never closed: such a reply has no response.
    """
    close = closing_tag(text)
    before, after = (text, "") if close is None else (text[: close.start()], text[close.end() :])
    return before.lstrip().removeprefix(OPEN).strip(), after.strip()


def assistant_text(reasoning: str, response: str) -> str:
    """The assistant turn that students learn, in R1's form."""
    return f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{response}"

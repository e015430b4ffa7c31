"""Where the reasoning ends, as the text comes.

R1's chat template opens the reasoning in the prompt, so that a reply begins inside it; other templates leave the
opening tag to the model. The first closing tag ends it, as in vLLM's `deepseek_r1` parser. Blank space around the tags
belongs to neither side.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

OPEN, CLOSE = "<think>", "</think>"
Parser = Literal["deepseek_r1", "none"]


class Piece(NamedTuple):
    """What some text brought each side; either may be empty."""

    reasoning: str
    content: str


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt leaves the reasoning open."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningSplit:
    """Splits a reply into reasoning and content. All the pieces together do not depend on how the text was dealt."""

    def __init__(self, parser: Parser, opened: bool) -> None:
        self._state: Literal["start", "reasoning", "content"] = "start"
        if parser == "none":
            self._state = "content"
        self._opened = opened  # the prompt ended with an opening tag
        self._held = ""
        self._skip_blank = False  # right behind a tag

    def push(self, text: str) -> Piece:
        self._held += text
        reasoning = ""
        if self._state == "start" and not self._begin():
            return Piece("", "")
        if self._state == "reasoning":
            reasoning = self._reason()
        return Piece(reasoning, self._take_content() if self._state == "content" else "")

    def flush(self) -> Piece:
        """What was held back, when no text comes any more."""
        rest, self._held = self._held, ""
        if self._state == "start" and self._opened:
            return Piece(rest, "")
        if self._state == "reasoning":
            return Piece(rest.lstrip() if self._skip_blank else rest, "")
        return Piece("", rest)

    def _begin(self) -> bool:
        """Whether it is clear which side the text begins on. A model may repeat the tag that the prompt ended with."""
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._held, self._state, self._skip_blank = start.removeprefix(OPEN), "reasoning", True
        elif OPEN.startswith(start):
            return False
        else:
            self._state = "reasoning" if self._opened else "content"
            self._skip_blank = self._opened  # the prompt's tag stands right before
        return True

    def _reason(self) -> str:
        if self._skip_blank:
            self._held = self._held.lstrip()
            if not self._held:
                return ""
        self._skip_blank = False
        before, tag, after = self._held.partition(CLOSE)
        if tag:
            self._held, self._state, self._skip_blank = after, "content", True
            return before.rstrip()
        # Blank space and the beginning of a tag wait: they may stand before the tag, or be it.
        sure = self._held[: len(self._held) - _overlap(self._held, CLOSE)].rstrip()
        self._held = self._held[len(sure) :]
        return sure

    def _take_content(self) -> str:
        text, self._held = self._held.lstrip() if self._skip_blank else self._held, ""
        self._skip_blank = self._skip_blank and not text
        return text


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)

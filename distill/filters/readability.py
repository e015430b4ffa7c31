"""readability: no wall of text and, where no code is asked for, no code block.

R1's SFT data leaves out chains of thought with long paragraphs and with code blocks (arXiv 2501.12948, section 2.3.3).
A paragraph is text between two line breaks: R1 breaks its thinking every few sentences, and a text that stops doing
so rambles. The longest paragraph of 323 published traces of R1 has 361 words, of 323 of QwQ-32B 390.
"""

from distill.filters.words import SIGN, Words, trace_words
from distill.recipe import ReadabilityFilter
from distill.records import Problem, Trace, Verdict

VERSION = 1

_FENCES = ("```", "~~~\n")


def check(traces: list[Trace], problems: dict[str, Problem], settings: ReadabilityFilter) -> list[Verdict]:
    """Reasoning and response together; code blocks are allowed for the kinds code and open."""
    found = []
    for trace, words in zip(traces, trace_words(traces), strict=True):
        code = settings.code_blocks or problems[trace["problem_id"]]["kind"] in ("code", "open")
        found.append(_check(trace, words, settings, code))
    return found


def _check(trace: Trace, words: Words, settings: ReadabilityFilter, code: bool) -> Verdict:
    longest, first = longest_paragraph(words)
    measured = {"longest_paragraph": float(longest)}
    if settings.max_paragraph_words is not None and longest > settings.max_paragraph_words:
        said = words.text(first, first + 8)
        return Verdict(
            False,
            f"a paragraph of {longest} words, more than {settings.max_paragraph_words}: '{said} ...'",
            measured,
        )
    if not code:
        for part in ("reasoning", "response"):
            text = trace[part]
            place = min((text.find(fence) for fence in _FENCES if fence in text), default=-1)
            if place >= 0:
                return Verdict(False, f"a code block at character {place} of the {part}", measured)
    return Verdict(True, f"the longest paragraph has {longest} words", measured)


def longest_paragraph(words: Words) -> tuple[int, int]:
    """(words in it, its first word's index); punctuation is not counted."""
    import numpy as np

    breaks = np.flatnonzero(np.frombuffer(words.data, dtype=np.uint8) == 10)
    counted = np.concatenate([[0], np.cumsum(words.kind != SIGN)])
    edges = np.concatenate([[0], np.searchsorted(words.start, breaks), [len(words)]])
    sizes = counted[edges[1:]] - counted[edges[:-1]]
    top = int(np.argmax(sizes))
    return int(sizes[top]), int(edges[top])

"""truncation: the sample ended by itself. Always on: a reply that was cut off teaches not to finish.

Published traces often come without the reason for their end. Where it is "unknown" the text has to show it: the
thinking closed, and the response neither stops in mid-formula nor at a word or comma that asks for more; nor, where an
answer has to be boxed and none is, within a sentence. A reply cut after a full stop looks whole; `format` misses its
answer.
"""

import re

from distill.records import Problem, Trace, Verdict

VERSION = 3

_REASONS = {
    "length": "cut off after {tokens} tokens (max_tokens {max_tokens})",
    "prompt_too_long": "never sent: the prompt of {prompt_tokens} tokens fills the teacher's context",
}


def check(traces: list[Trace], problems: dict[str, Problem], settings: None) -> list[Verdict]:
    """Pass exactly the traces with finish_reason 'stop'."""
    return [_check(trace, problems[trace["problem_id"]]["kind"]) for trace in traces]


def _check(trace: Trace, kind: str) -> Verdict:
    if trace["finish_reason"] == "stop":
        return Verdict(True, "ended by itself")
    if trace["finish_reason"] == "unknown":
        return _check_text(trace["text"], trace["response"], kind)
    reason = _REASONS.get(trace["finish_reason"], "did not end by itself: {finish_reason}")
    return Verdict(
        False,
        reason.format(
            tokens=trace["reasoning_tokens"] + trace["answer_tokens"],
            max_tokens=trace["sampling"].get("max_tokens", "not recorded"),
            prompt_tokens=trace["prompt_tokens"],
            finish_reason=trace["finish_reason"],
        ),
    )


_UNFINISHED = re.compile(
    r"(?:[,;:(\[{=+/\\^-]|\b(?:the|a|an|of|and|or|to|is|are|in|with|by|that|for))\Z", re.IGNORECASE
)
_STATED = ("math", "exact", "choice")


def _check_text(text: str, response: str, kind: str) -> Verdict:
    """For traces whose end nobody recorded."""
    if "</think>" not in text:
        return Verdict(False, "cut off, it seems: the thinking never closes")
    if not response:
        return Verdict(False, "cut off, it seems: nothing after </think>")
    if response.count("```") % 2:
        return Verdict(False, "cut off, it seems: a code block is open at the end")
    if response.count("$$") % 2 or response.count("\\[") > response.count("\\]"):
        return Verdict(False, "cut off, it seems: a formula is open at the end")
    if _UNFINISHED.search(response[-40:].rstrip("*_ \n")):  # bold type may end after the full stop
        return Verdict(False, f"cut off, it seems: it ends in '{response[-20:]}'")
    if kind in _STATED and _within_sentence(response):
        return Verdict(False, f"cut off, it seems: it ends within a sentence, '{response[-40:]}'")
    return Verdict(True, "ended, as far as the text shows")


def _within_sentence(response: str) -> bool:
    """No answer is boxed yet, and the last line is prose without a full stop.

    Of 1,292 published replies to problems in mathematics none ends like this, with a box or without.
    """
    line = response[-400:].rstrip().rpartition("\n")[2]
    prose = line[-1:].islower() and not re.match(r"[-*#|>+\d]", line) and len(line.split()) >= 4
    return prose and "\\boxed" not in response and not re.search(r"answer[^.]*\Z", line, re.IGNORECASE)

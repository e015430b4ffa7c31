"""length: bounds on the reasoning's tokens, as the teacher's tokenizer counts them."""

from distill.recipe import LengthFilter
from distill.records import Problem, Trace, Verdict

VERSION = 1


def check(traces: list[Trace], problems: dict[str, Problem], settings: LengthFilter) -> list[Verdict]:
    return [_check(trace["reasoning_tokens"], settings) for trace in traces]


def _check(tokens: int, settings: LengthFilter) -> Verdict:
    if settings.max_reasoning_tokens is not None and tokens > settings.max_reasoning_tokens:
        return Verdict(False, f"{tokens} reasoning tokens, more than {settings.max_reasoning_tokens}")
    if tokens < settings.min_reasoning_tokens:
        return Verdict(False, f"{tokens} reasoning tokens, fewer than {settings.min_reasoning_tokens}")
    return Verdict(True, f"{tokens} reasoning tokens")

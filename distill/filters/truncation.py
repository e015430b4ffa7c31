"""truncation: the sample ended by itself. Always on: a reply that was cut off teaches not to finish."""

from distill.records import Problem, Trace, Verdict

VERSION = 1

_REASONS = {
    "length": "cut off after {tokens} tokens (max_tokens {max_tokens})",
    "prompt_too_long": "never sent: the prompt of {prompt_tokens} tokens fills the teacher's context",
}


def check(traces: list[Trace], problems: dict[str, Problem], settings: None) -> list[Verdict]:
    """Pass exactly the traces with finish_reason 'stop'."""
    return [_check(trace) for trace in traces]


def _check(trace: Trace) -> Verdict:
    if trace["finish_reason"] == "stop":
        return Verdict(True, "ended by itself")
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

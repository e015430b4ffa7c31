"""From a server's answer to the Reply that is recorded: the text in one form, the outcome, the tokens, the money."""

import math
from typing import Any

from distill.endpoints.answers import Answer
from distill.endpoints.failures import Failure
from distill.reasoning import CLOSE, OPEN, closing_tag
from distill.records import Ask, Reply, TopLogprobs

_FINISH = {
    "stop": "stop", "eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop",
    "tool_calls": "stop", "function_call": "stop",
    "length": "length", "max_tokens": "length", "content_filter": "content_filter",
}  # fmt: skip


def make_reply(ask: Ask, answer: Answer, seconds: float, chat: bool) -> Reply:
    """The Reply, without cost, attempts and endpoint. Raises Failure for an end that is the server's trouble."""
    if answer.finish is None:
        finish = "stop"  # the body came whole, or its stream to [DONE]
    elif answer.finish in _FINISH:
        finish = _FINISH[answer.finish]
    else:  # DeepSeek: "insufficient_system_resource"; vLLM, SGLang: "abort", "error"
        raise Failure(answer.finish[:40], "the server gave up", usage=answer.usage)
    reasoning, content = "".join(answer.reasoning), "".join(answer.content)
    # A server that has a field for the reasoning and left it empty says that all of it is answer.
    answered = answer.separates and chat and finish == "stop"
    text = one_text(reasoning, content, answered)
    if answer.refusal and not content.strip():
        finish, text = "refusal", text or answer.refusal
    elif answer.invalid:
        finish = "invalid_utf8"
    elif finish == "stop" and not text.strip():
        finish = "empty"
    prompt, thought, answered_tokens = count_tokens(ask, answer, text)
    logprobs = None
    if ask.logprobs:
        chosen = answer.chosen if len(answer.chosen) == len(answer.likeliest) else ()
        logprobs = TopLogprobs(answer.likeliest, answer.logprobs, chosen)
    return Reply(ask.id, text, finish, prompt, thought, answered_tokens, seconds, logprobs=logprobs)


def one_text(reasoning: str, content: str, answered: bool = False) -> str:
    """What our engine would have said: the reasoning, "\\n</think>\\n\\n", the answer, without an opening tag.

    answered: content without reasoning is an answer, for the server tells them apart.
    """
    if reasoning.strip():
        thought = _without_opening(reasoning)
        if not content:
            return thought  # the thinking never closed, or nobody can tell
        if content.lstrip().startswith(CLOSE):  # the server split before the tag
            content = content.lstrip().removeprefix(CLOSE)
        return f"{thought.rstrip()}\n{CLOSE}\n\n{content.lstrip()}"
    if answered and content.strip() and CLOSE not in content and not content.lstrip().startswith(OPEN):
        return f"{CLOSE}\n\n{content}"
    return _without_opening(content)


def _without_opening(text: str) -> str:
    stripped = text.lstrip()
    return stripped.removeprefix(OPEN).lstrip("\n") if stripped.startswith(OPEN) else text


def count_tokens(ask: Ask, answer: Answer, text: str) -> tuple[int, int, int]:
    """(prompt, reasoning, answer) tokens, as the server counts them: with the end-of-sequence token.

    What it does not say is estimated: generated tokens as a quarter of the characters, reasoning by its share of the
    text.
    """
    usage = answer.usage
    generated = _number(usage.get("completion_tokens"))
    if generated is None:
        generated = math.ceil(len(text) / 4)
    details = usage.get("completion_tokens_details")
    thought = _number(details.get("reasoning_tokens")) if isinstance(details, dict) else None
    if thought is None:
        thought = _number(usage.get("reasoning_tokens"))  # SGLang
    close = closing_tag(text)
    # A server that leaves the reasoning in the content counts none of it.
    if thought is None or (thought == 0 and (close is None or close.start() > 0)):
        share = 1.0 if close is None else close.end() / len(text)
        thought = round(generated * share)
    prompt = _number(usage.get("prompt_tokens"))
    if prompt is None:
        prompt = math.ceil(sum(len(message["content"]) for message in ask.messages) / 4)
    return prompt, min(thought, generated), max(0, generated - thought)


def charged(usage: Any, prompt_price: float, completion_price: float) -> float:
    """What the tokens of `usage` cost at the prices of a million."""
    if not isinstance(usage, dict):
        return 0.0
    prompt, generated = _number(usage.get("prompt_tokens")) or 0, _number(usage.get("completion_tokens")) or 0
    return (prompt * prompt_price + generated * completion_price) / 1e6


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

"""What goes into the engine and what comes out. Free of torch, so that a command line may import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """One prompt to continue. `seed` alone decides the draws: samples of one prompt need different seeds."""

    id: str
    prompt_ids: Sequence[int]
    temperature: float = 0.6  # 0: always the most likely token
    top_p: float = 0.95
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # keep tokens at least this share as likely as the likeliest; 0: no limit
    max_tokens: int = 32768
    seed: int = 0  # any int64
    stop_ids: Sequence[int] | None = None  # None: the engine's
    stop: Sequence[str] = ()  # the text ends before the first of these; needs an engine with a tokenizer
    text: bool = False  # decode as it goes: updates and the completion carry text; implied by `stop`
    stream: bool = False  # an update a step; otherwise one, at the end
    logprobs: int | None = None  # n: each token's log-probability and the n likeliest tokens'; None: none


class TokenLogprobs(NamedTuple):
    """Log-probabilities (natural) at one position, of the model's own distribution before temperature and cut-offs."""

    logprob: float  # of the token that was drawn
    top: list[tuple[int, float]]  # (token id, log-probability), likeliest first


@dataclass(frozen=True)
class Completion:
    """A finished request."""

    id: str
    token_ids: list[int]  # without the stop token; with `stop`, up to the token that completed the stop string
    finish_reason: FinishReason
    stop_id: int | None  # the stop token that ended it
    prompt_tokens: int
    seconds: float  # from entering a slot to finishing, shared with the rest of the batch
    text: str | None = None  # if asked for; ends before the stop string
    stop_text: str | None = None  # the stop string that ended it
    logprobs: list[TokenLogprobs] | None = None  # one a token of token_ids
    cached_tokens: int = 0  # of the prompt, found in the cache instead of computed


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, and what it holds now."""

    waiting: int
    running: int
    preempted: int
    cache_tokens_total: int
    cache_tokens_used: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Update:
    """What one or more steps brought one request; the last one carries its completion.

    `text` is safe to show: what may turn out a stop string, or is part of a character, is held back.
    """

    id: str
    token_ids: list[int]  # new ones, without the stop token
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a new token, if asked for
    completion: Completion | None = None


def problem_with(request: Request, max_len: int, vocabulary: int, has_tokenizer: bool) -> str | None:
    """Why an engine of these limits can never serve the request; None if it can."""
    if not request.prompt_ids:
        return "its prompt is empty"
    if len(request.prompt_ids) >= max_len:
        return f"its prompt has {len(request.prompt_ids)} tokens; expected fewer than max_len ({max_len})"
    if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocabulary:
        return f"its prompt has token ids outside the vocabulary of {vocabulary}"
    if not 0 <= request.temperature < float("inf"):
        return f"temperature is {request.temperature}; expected 0 or more"
    if not 0 < request.top_p <= 1:
        return f"top_p is {request.top_p}; expected above 0, at most 1"
    if not 0 <= request.top_k < 2**63:
        return f"top_k is {request.top_k}; expected 0 (no limit) or more, as a 64-bit integer"
    if not 0 <= request.min_p <= 1:
        return f"min_p is {request.min_p}; expected 0 (no limit) to 1"
    if request.max_tokens < 1:
        return f"max_tokens is {request.max_tokens}; expected at least 1"
    if not -(2**63) <= request.seed < 2**63:
        return f"seed is {request.seed}; expected a 64-bit integer"
    if request.logprobs is not None and not 0 <= request.logprobs <= vocabulary:
        return f"logprobs is {request.logprobs}; expected 0 to {vocabulary}"
    if (request.stop or request.text) and not has_tokenizer:
        return "stop strings and text need an engine with a tokenizer"
    if "" in request.stop:
        return "a stop string is empty"
    return None

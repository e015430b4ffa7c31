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

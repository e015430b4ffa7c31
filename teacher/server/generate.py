"""From a checked body and its prompts to the engine's requests: n for each prompt, each with a seed of its own."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher.requests import Request
from teacher.server.chat import Parser
from teacher.server.errors import ApiError
from teacher.server.prompts import Prompt
from teacher.server.protocol import ChatBody, CompletionBody, Sampling


@dataclass(frozen=True)
class Defaults:
    """Sampling where a body does not say: what the model's makers put into generation_config.json, else OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True)
class Served:
    """What the server serves."""

    names: Sequence[str]  # a client may use any of them; replies carry the first
    model: Any  # teacher.model.DeepseekV3, for the log-probabilities of prompts; only the worker's thread runs it
    tokenizer: Any
    max_len: int  # tokens of the longest sequence, prompt and completion
    vocab_size: int
    stop_ids: Sequence[int]
    defaults: Defaults = Defaults()
    parser: Parser = "deepseek_r1"

    def check_name(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(404, f"no model {name!r} here; this server has {known}", "model", "model_not_found")


def read_defaults(folder: Path) -> Defaults:
    """Sampling settings of the folder's generation_config.json. Raises ValueError for one that this engine has not."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return Defaults()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    for name in ("repetition_penalty", "no_repeat_ngram_size", "typical_p"):
        neutral = 0 if name == "no_repeat_ngram_size" else 1
        if found.get(name) not in (None, neutral):
            raise ValueError(f"{file}: {name} is {found[name]}, which this engine does not apply; remove it")
    values = {name: found.get(name) for name in ("temperature", "top_p", "top_k", "min_p")}
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise ValueError(f"{file}: {name} is {value!r}; expected a number, 0 or more")
    return Defaults(**{name: value for name, value in values.items() if value is not None})


def engine_requests(served: Served, body: Sampling, prompts: Sequence[Prompt], call_id: str) -> list[Request]:
    """The i-th sample of the p-th prompt is at p * n + i. Raises ApiError 400 for one that has no room."""
    default, seed = served.defaults, secrets.randbits(63) if body.seed is None else body.seed
    outside = [id for id in body.stop_token_ids if id >= served.vocab_size]
    if outside:
        message = f"stop_token_ids: {outside[0]} is outside the vocabulary of {served.vocab_size}"
        raise ApiError(400, message, "stop_token_ids")
    stop_ids = [*(() if body.ignore_eos else served.stop_ids), *body.stop_token_ids]
    requests: list[Request] = []
    for prompt in prompts:
        max_tokens = room_for(served, body, len(prompt.ids))
        for sample in range(body.n):
            requests.append(
                Request(
                    id=f"{call_id}-{len(requests)}",
                    prompt_ids=prompt.ids,
                    temperature=default.temperature if body.temperature is None else body.temperature,
                    top_p=default.top_p if body.top_p is None else body.top_p,
                    top_k=default.top_k if body.top_k is None else max(0, body.top_k),
                    min_p=default.min_p if body.min_p is None else body.min_p,
                    max_tokens=max_tokens,
                    seed=sample_seed(seed, sample),
                    stop_ids=stop_ids,
                    stop=body.stops,
                    text=True,
                    stream=body.stream,
                    logprobs=_logprobs(body),
                )
            )
    return requests


def room_for(served: Served, body: Sampling, prompt_tokens: int) -> int:
    """The most tokens that the completion may have. Raises ApiError 400 if what is asked for does not fit."""
    asked, param = None, "max_tokens"
    if isinstance(body, ChatBody):
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    elif isinstance(body, CompletionBody):
        asked = body.max_tokens
    left = served.max_len - prompt_tokens
    if left < (1 if asked is None else asked):
        completion = "" if asked is None else f" and {asked} for the completion"
        message = f"the prompt has {prompt_tokens} tokens{completion}; this model takes {served.max_len} at most in all"
        prompt_param = "messages" if isinstance(body, ChatBody) else "prompt"
        raise ApiError(400, message, prompt_param if left < 1 else param, "context_length_exceeded")
    return left if asked is None else asked


def sample_seed(seed: int, sample: int) -> int:
    """Sample 0 keeps the seed; the others get far-off ones, so that neighbouring seeds share no sample."""
    mixed = (seed + sample * 0x9E3779B97F4A7C15) % 2**64  # 2^64 / golden ratio
    return mixed - 2**64 if mixed >= 2**63 else mixed


def _logprobs(body: Sampling) -> int | None:
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else None
    assert isinstance(body, CompletionBody)
    # With echo, one forward pass over prompt and completion gives all of them.
    return None if body.echo else body.logprobs

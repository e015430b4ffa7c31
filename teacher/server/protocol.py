"""What the body of a request may hold. Nothing is silently ignored that would change the answer.

A field is one of four: served (the models below), without effect on the answer, accepted only at the value that asks
for nothing, or unknown. The last two are answered 400 with the field's name. `null` counts as not given.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from teacher.server.errors import ApiError

MOST_CHOICES = 128
MOST_TOP_LOGPROBS = 20

# They concern billing, caching and tracking elsewhere, or say how to compute what comes out the same.
WITHOUT_EFFECT = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "prediction", "request_id", "priority", "cache_salt", "spaces_between_special_tokens",
    }
)  # fmt: skip

# Not served; the values with which a body asks for nothing.
ONLY_AT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "reasoning_effort": (),
    "web_search_options": (),
    "best_of": (1,),
    "suffix": ("",),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}

StopString = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False


class Sampling(_Body):
    """What both endpoints share. A setting that is not given is the model's, from generation_config.json."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    temperature: Annotated[float | None, Field(ge=0)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31)] = None  # -1 and 0: no limit
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: StopString | Annotated[list[StopString], Field(max_length=32)] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] = []
    ignore_eos: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(_Body):
    type: str
    text: str = ""


class Message(BaseModel):
    # A client sends back what it got: tool_calls null, refusal null, reasoning_content, ... The template sees the two.
    model_config = ConfigDict(strict=True, extra="ignore")

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None  # OpenAI's new name; it goes first
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP_LOGPROBS)] = None


class CompletionBody(Sampling):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP_LOGPROBS)] = None
    echo: bool = False
    add_special_tokens: bool = True


class TokenizeBody(_Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1)] = None
    add_special_tokens: bool = True


AnyBody = TypeVar("AnyBody", bound=BaseModel)


def parse(kind: type[AnyBody], body: Any) -> AnyBody:
    """The body, checked. Raises ApiError 400 that names the field."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; expected an object")
    given = {name: value for name, value in body.items() if value is not None and name not in WITHOUT_EFFECT}
    for name in [name for name in given if name not in kind.model_fields]:
        _refuse_unless_nothing(kind, name, given.pop(name))
    try:
        checked = kind.model_validate(given)
    except ValidationError as error:
        raise _first(error) from None
    if isinstance(checked, Sampling):
        _check_together(checked)
    return checked


def _refuse_unless_nothing(kind: type[BaseModel], name: str, value: Any) -> None:
    if name not in ONLY_AT:
        near = get_close_matches(name, kind.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ApiError(400, f"unknown field {name!r}{hint}", name, "unknown_parameter")
    # True is not 1 here: a flag where a number stands is a mistake, not nothing.
    if not any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in ONLY_AT[name]):
        accepted = " or ".join(["null", *map(repr, ONLY_AT[name])])
        raise ApiError(400, f"{name} is not supported; expected it absent or {accepted}", name, "unsupported_parameter")


def _check_together(body: Sampling) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options are given, but stream is not true", "stream_options")
    if isinstance(body, ChatBody) and body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given, but logprobs is not true", "top_logprobs")
    if isinstance(body, CompletionBody):
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens is 0; expected at least 1 unless echo is true", "max_tokens")
        if body.echo and body.stream and body.logprobs is not None:
            raise ApiError(400, "echo with logprobs is not supported in a stream", "stream", "unsupported_parameter")


def _first(error: ValidationError) -> ApiError:
    """The first thing wrong. Of a field with several forms, as prompt has, the form that fits furthest is told."""
    found = error.errors(include_url=False, include_context=False)
    forms: dict[Any, Any] = {}
    for item in found:
        if item["loc"][0] == found[0]["loc"][0]:
            forms.setdefault(item["loc"][1] if len(item["loc"]) > 1 else None, item)
    furthest = max(map(_indices, forms.values()))
    told = [item for item in forms.values() if _indices(item) == furthest]
    place, value = _place(told[0]["loc"]), told[0]["input"]
    shown = isinstance(value, int | float) or (isinstance(value, str) and len(value) < 40)
    message = "; or ".join(dict.fromkeys(str(item["msg"]) for item in told))
    return ApiError(400, f"{place}: {message}" + (f" (found {value!r})" if shown else ""), place)


def _indices(item: Any) -> tuple[int, ...]:
    return tuple(step for step in item["loc"] if isinstance(step, int))


def _place(loc: tuple[int | str, ...]) -> str:
    """messages[0].role: pydantic also names the branch of a union, as in 'list[constrained-str]', which is no field."""
    place = str(loc[0])
    for step in loc[1:]:
        if isinstance(step, int):
            place += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int", "float"):
            place += f".{step}"
    return place

"""What is sent: the body of a request, from an Ask and the recipe's teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from distill.endpoints.dial import Address
from distill.endpoints.failures import TooLong
from distill.errors import UserError
from distill.reasoning import OPEN
from distill.recipe_teacher import Teacher
from distill.records import Ask
from distill.rendering import ChatTokenizer
from distill.shipped import resolve_model

PATHS = {"chat": "/chat/completions", "completions": "/completions"}


class Bodies:
    """Writes bodies for one endpoint. `prompt` renders a chat, for the completions API."""

    def __init__(self, teacher: Teacher, model: str, prefix: dict[str, Any] | None, prompt: ChatTokenizer | None):
        self._fixed: dict[str, Any] = {"model": model, **teacher.body, "stream": teacher.stream}
        if teacher.stream:
            self._fixed["stream_options"] = {"include_usage": True}
        self._prompt = prompt
        self._chat = teacher.api == "chat"
        self._turns: list[dict[str, Any]] = []
        if prefix is not None:
            self._turns = [prefix]
            if not prefix.get("prefix"):
                self._fixed |= {"continue_final_message": True, "add_generation_prompt": False}

    def write(self, ask: Ask, max_tokens: int) -> bytes:
        body = {
            **self._fixed,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "max_tokens": max_tokens,
            "seed": ask.seed,
        }
        if self._chat:
            body["messages"] = [*ask.messages, *self._turns]
            if ask.logprobs:
                body |= {"logprobs": True, "top_logprobs": ask.logprobs}
        else:
            assert self._prompt is not None
            # The template wrote the special tokens; the server must not add them again.
            body |= {"prompt": self._prompt.text(ask.messages), "add_special_tokens": False}
            if ask.logprobs:
                body["logprobs"] = ask.logprobs
        return orjson.dumps(body)


def bodies(teacher: Teacher) -> Callable[[str, Address], Bodies]:
    """How bodies for an endpoint (its model's name, its address) are made. Reads the tokenizer where one is needed.

    `think` with the chat API, where the server renders the prompt: 'force' begins the assistant's turn, in vLLM's and
    SGLang's words or, at deepseek.com, in DeepSeek's; 'auto' does so only if the tokenizer is a folder that can be
    read here, and its template leaves the thinking closed. With completions it is as `distill.rendering` says.
    """
    name = teacher.tokenizer or teacher.model
    field = "teacher.tokenizer" if teacher.tokenizer else "teacher.model"
    if teacher.api == "completions":
        prompt = ChatTokenizer(name, teacher.revision, teacher.think, field)
        return lambda model, address: Bodies(teacher, model, None, prompt)
    forced = teacher.think == "force" or (teacher.think == "auto" and _leaves_closed(name))
    return lambda model, address: Bodies(teacher, model, _prefix(address) if forced else None, None)


def _leaves_closed(name: str) -> bool:
    folder = resolve_model(name)
    if not isinstance(folder, Path) or not (folder / "tokenizer_config.json").is_file():
        return False
    try:
        template = ChatTokenizer(name, think="leave")
    except UserError:
        return False  # it has no template, or needs code of its own: the server's business
    return not template.text([{"role": "user", "content": "?"}]).rstrip().endswith(OPEN)


def _prefix(address: Address) -> dict[str, Any]:
    turn = {"role": "assistant", "content": f"{OPEN}\n"}
    if address.host == "deepseek.com" or address.host.endswith(".deepseek.com"):
        if not address.parts.path.rstrip("/").endswith("/beta"):
            raise UserError(
                f"{address.place}: forcing '{OPEN}' needs DeepSeek's beta API, https://api.deepseek.com/beta; "
                "or set teacher.think=leave"
            )
        return {**turn, "prefix": True}
    return turn


def room_for(ask: Ask, max_tokens: int, error: TooLong) -> int | None:
    """Tokens that a reply may have, where the server said so and it is fewer than it was asked for; else None."""
    if error.limit is None:
        return None
    if error.exact and error.prompt is not None:
        rooms = [error.limit - error.prompt]
    else:
        # No token is shorter than a byte, and few prompts have more than one in two bytes.
        size = sum(len(message["content"].encode()) for message in ask.messages) + 64
        rooms = [error.limit - size, error.limit - size // 2]
    return next((room for room in rooms if 1 <= room < max_tokens), None)

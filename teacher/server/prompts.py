"""Messages, text and token ids to prompt ids, on threads of their own: a long prompt holds up nobody else's stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from teacher.server.errors import ApiError
from teacher.server.protocol import CompletionBody, Message

ROLES = ("system", "developer", "user", "assistant")
Result = TypeVar("Result")


class Prompt(NamedTuple):
    ids: list[int]
    text: str | None  # None where the client sent ids


class Prompts:
    """Raises ApiError 400 for a prompt that is none. `vocab_size` is the model's."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._threads = ThreadPoolExecutor(2, "tokenizer")

    async def of_chat(self, messages: Sequence[Message]) -> Prompt:
        return await self._aside(self._render, messages)

    async def of_completion(self, body: CompletionBody) -> list[Prompt]:
        """One for each prompt of the batch; a list of ids is one prompt."""
        given: Any = body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given or not all(given):
            raise ApiError(400, "prompt is empty", "prompt")
        return [
            await self.of_text(item, body.add_special_tokens) if isinstance(item, str) else self.of_ids(item)
            for item in given
        ]

    async def of_text(self, text: str, add_special_tokens: bool) -> Prompt:
        return await self._aside(self._encode, text, add_special_tokens, "prompt")

    def of_ids(self, ids: list[int]) -> Prompt:
        if max(ids) >= self.vocab_size:
            raise ApiError(400, f"prompt: token id {max(ids)} is outside the vocabulary of {self.vocab_size}", "prompt")
        return Prompt(ids, None)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _aside(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _render(self, messages: Sequence[Message]) -> Prompt:
        if not self.tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", "messages")
        turns = [_turn(message, f"messages[{n}]") for n, message in enumerate(messages)]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program that comes with the model: it may raise anything
            raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error
        # The template writes the special tokens, so none may be added again.
        return self._encode(text, False, "messages")

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> Prompt:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ApiError(400, f"{param}: half a surrogate pair is no text", param) from None
        ids = list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        if not ids:
            raise ApiError(400, f"{param} has no tokens", param)
        return Prompt(ids, text)


def _turn(message: Message, place: str) -> dict[str, str]:
    """A turn as chat templates take it: text only."""
    if message.role not in ROLES:
        raise ApiError(400, f"{place}.role is {message.role!r}; expected {', '.join(ROLES)}", f"{place}.role")
    role = "system" if message.role == "developer" else message.role
    if message.content is None:
        raise ApiError(400, f"{place}.content is missing; expected text", f"{place}.content")
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    texts = []
    for n, part in enumerate(message.content):
        here = f"{place}.content[{n}]"
        if part.get("type") != "text":
            raise ApiError(400, f"{here}.type is {part.get('type')!r}; this model reads text only", f"{here}.type")
        if not isinstance(part.get("text"), str):
            raise ApiError(400, f"{here}.text is missing; expected a string", f"{here}.text")
        texts.append(part["text"])
    return {"role": role, "content": "".join(texts)}

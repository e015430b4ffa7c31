"""What clients get: whole replies, and chunks of a stream. A reply object belongs to one call."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from teacher.requests import Completion, TokenLogprobs, Update
from teacher.server.chat import CLOSE, ReasoningSplit, opens_reasoning
from teacher.server.generate import Served
from teacher.server.logprobs import CompletionLogprobs, Scores, chat_entries
from teacher.server.prompts import Prompt
from teacher.server.protocol import ChatBody, CompletionBody, Sampling
from teacher.text import TextStream


class Reply(ABC):
    """What the two endpoints share: identity, end of a choice, usage."""

    kind: str  # of a whole reply
    chunk_kind: str

    def __init__(self, served: Served, call_id: str, body: Sampling, prompts: Sequence[Prompt]) -> None:
        self.served, self.id, self.body, self.prompts = served, call_id, body, prompts
        self.created = int(time.time())
        options = body.stream_options
        self.with_usage = options is not None and options.include_usage

    @abstractmethod
    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream begins with."""

    @abstractmethod
    def chunk(self, index: int, update: Update) -> dict[str, Any] | None:
        """The body of a streamed event of choice `index`; None where there is nothing to show yet."""

    @abstractmethod
    def whole(self, done: Sequence[Completion], scores: Sequence[Scores] | None = None) -> dict[str, Any]:
        """The body of a reply in one piece; `scores`, for echo with logprobs, go from the prompt to the stop token."""

    def envelope(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        name = self.served.names[0]
        return {"id": self.id, "object": kind, "created": self.created, "model": name, "choices": choices}

    def as_chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self.envelope(choices, self.chunk_kind)
        return chunk | {"usage": None} if self.with_usage else chunk

    def usage_chunk(self, done: Sequence[Completion]) -> dict[str, Any]:
        """The last chunk of a stream with stream_options.include_usage."""
        return self.envelope([], self.chunk_kind) | {"usage": self.usage(done)}

    def usage(self, done: Sequence[Completion]) -> dict[str, Any]:
        """A prompt counts once, however many samples it has; a stop token counts as generated, as it was."""
        prompt = sum(len(prompt.ids) for prompt in self.prompts)
        generated = sum(len(c.token_ids) + (c.stop_id is not None) for c in done)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in done[:: self.body.n])},
        }
        return usage

    def end(self, done: Completion) -> dict[str, Any]:
        """Why a choice ended; stop_reason, as vLLM's, is the string or token of the body that ended it."""
        reason = done.stop_text if done.stop_id is None else done.stop_id
        named = done.stop_text is not None or done.stop_id in self.body.stop_token_ids
        return {"finish_reason": done.finish_reason, "stop_reason": reason if named else None}


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    body: ChatBody

    def __init__(self, served: Served, call_id: str, body: ChatBody, prompts: Sequence[Prompt]) -> None:
        super().__init__(served, call_id, body, prompts)
        opened = opens_reasoning(prompts[0].text or "")
        self._opened = opened
        self._splits = [ReasoningSplit(served.parser, opened) for _ in range(body.n)]

    def first_chunks(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            self.as_chunk([{"index": n, "delta": delta, "logprobs": None, "finish_reason": None}])
            for n in range(self.body.n)
        ]

    def chunk(self, index: int, update: Update) -> dict[str, Any] | None:
        reasoning, content = self._splits[index].push(update.text)
        if update.completion is not None:
            rest = self._splits[index].flush()
            reasoning, content = reasoning + rest.reasoning, content + rest.content
        delta: dict[str, Any] = {"content": content} if content else {}
        if reasoning:
            delta |= {"reasoning_content": reasoning, "reasoning": reasoning}
        logprobs = self._logprobs(update.token_ids, update.logprobs)
        if not delta and not (logprobs and logprobs["content"]) and update.completion is None:
            return None
        end = {"finish_reason": None} if update.completion is None else self.end(update.completion)
        return self.as_chunk([{"index": index, "delta": delta, "logprobs": logprobs, **end}])

    def whole(self, done: Sequence[Completion], scores: Sequence[Scores] | None = None) -> dict[str, Any]:
        choices = []
        for index, completion in enumerate(done):
            split = ReasoningSplit(self.served.parser, self._opened)
            parts = split.push(completion.text or ""), split.flush()
            message: dict[str, Any] = {"role": "assistant", "content": "".join(part.content for part in parts)}
            if self.served.parser != "none":
                reasoning = "".join(part.reasoning for part in parts) or None
                message |= {"reasoning_content": reasoning, "reasoning": reasoning}
            logprobs = self._logprobs(completion.token_ids, completion.logprobs or [])
            choices.append({"index": index, "message": message, "logprobs": logprobs, **self.end(completion)})
        return self.envelope(choices, self.kind) | {"usage": self.usage(done)}

    def usage(self, done: Sequence[Completion]) -> dict[str, Any]:
        reasoning = sum(map(self._reasoning_tokens, done)) if self.served.parser != "none" else 0
        return super().usage(done) | {"completion_tokens_details": {"reasoning_tokens": reasoning}}

    def _reasoning_tokens(self, done: Completion) -> int:
        """Tokens up to the one that completes the closing tag; all, if it never comes."""
        if not self._opened and not (done.text or "").lstrip().startswith("<think>"):
            return 0
        text = TextStream(self.served.tokenizer, [CLOSE])
        text.push(done.token_ids)
        return text.tokens

    def _logprobs(self, ids: Sequence[int], found: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return {"content": chat_entries(self.served.tokenizer, ids, found)} if self.body.logprobs else None


class CompletionReply(Reply):
    """Of /v1/completions."""

    kind, chunk_kind = "text_completion", "text_completion"
    body: CompletionBody

    def __init__(self, served: Served, call_id: str, body: CompletionBody, prompts: Sequence[Prompt]) -> None:
        super().__init__(served, call_id, body, prompts)
        self._logprobs = [CompletionLogprobs(served.tokenizer) for _ in range(body.n * len(prompts))]

    def first_chunks(self) -> list[dict[str, Any]]:
        if not self.body.echo:
            return []
        texts = [self._prompt_text(index) for index in range(len(self._logprobs))]
        return [self.as_chunk([self._choice(n, text, None)]) for n, text in enumerate(texts)]

    def chunk(self, index: int, update: Update) -> dict[str, Any] | None:
        if not update.text and not update.logprobs and update.completion is None:
            return None
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self._logprobs[index].entries(update.token_ids, update.logprobs)
        end = {} if update.completion is None else self.end(update.completion)
        return self.as_chunk([self._choice(index, update.text, logprobs) | end])

    def whole(self, done: Sequence[Completion], scores: Sequence[Scores] | None = None) -> dict[str, Any]:
        choices = []
        for index, completion in enumerate(done):
            text, logprobs = completion.text or "", None
            if self.body.echo:
                text = self._prompt_text(index) + text
            if scores is not None:
                logprobs = self._logprobs[index].entries(self.sequence(index, completion), scores[index])
            elif self.body.logprobs is not None:
                logprobs = self._logprobs[index].entries(completion.token_ids, completion.logprobs or [])
            choices.append(self._choice(index, text, logprobs) | self.end(completion))
        return self.envelope(choices, self.kind) | {"usage": self.usage(done)}

    def sequence(self, index: int, done: Completion) -> list[int]:
        """All tokens of a choice, as the model saw and made them."""
        stop = [] if done.stop_id is None else [done.stop_id]
        return [*self.prompts[index // self.body.n].ids, *done.token_ids, *stop]

    def nothing_generated(self) -> list[Completion]:
        """What max_tokens 0 gives."""
        ids = [prompt.ids for prompt in self.prompts for _ in range(self.body.n)]
        return [Completion(f"{self.id}-{n}", [], "length", None, len(p), 0.0, text="") for n, p in enumerate(ids)]

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}

    def _prompt_text(self, index: int) -> str:
        prompt = self.prompts[index // self.body.n]
        if prompt.text is not None:
            return prompt.text
        return self.served.tokenizer.decode(prompt.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

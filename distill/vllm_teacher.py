"""teacher.kind 'vllm': vLLM's engine on this node, asked without a server in between.

The engine always runs in a process of its own, also where vLLM could be imported here: with a GPU it starts processes
in any case, and so its crash costs a restart instead of the run, its memory is free again when the stage ends, and it
may live in another environment than ours. Prompts go there as token ids and replies come back as such: template, stop
tokens and counting are the same code as for other teachers.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.errors import UserError
from distill.recipe import Sampling, Teacher
from distill.records import Ask, Asks, EndpointState, Reply, TopLogprobs
from distill.rendering import ChatTokenizer, stop_ids
from distill.serving.arguments import engine_arguments, sequence_length
from distill.serving.engine_process import EngineProcess
from distill.serving.gpus import gpu_memories
from distill.serving.interpreter import vllm_python
from distill.serving.model import read_facts
from distill.serving.placement import place
from distill.vllm_identity import identity as identity
from distill.vllm_identity import pinned

# Starts in a row that come to nothing, after which the engine is given up.
STARTS = 3
# Asks beyond those decoded at once, as a share: a slot that falls free is filled without waiting for us.
_AHEAD = 0.25
# Drawn at once: prompts take a fraction of a millisecond each, and the caller is to hear from us every 0.2 s.
_DRAWN = 256
_TICK = 0.1
_MOST_BACK_OFF = 60.0


class EngineDied(OSError):
    """vLLM's engine did not stay alive; the text says what it said last."""


@dataclass(slots=True)
class _Flight:
    ask: Ask
    prompt: list[int]
    attempts: int = 0


def open_vllm(teacher: Teacher, sampling: Sampling) -> "VllmTeacher":
    """A teacher ready to be asked; its engine starts with the first ask. Raises UserError for what cannot work."""
    teacher = pinned(teacher)
    facts = read_facts(teacher.model, teacher.revision)
    name = identity(teacher)["id"]
    length = sequence_length(teacher, sampling, facts)
    at = place(facts, teacher.vllm, gpu_memories(), length or sampling.max_tokens)
    arguments = engine_arguments(teacher, facts, at, length) | {"skip_tokenizer_init": True}
    python = vllm_python(teacher.vllm.python)
    chat = ChatTokenizer(teacher.tokenizer or teacher.model, teacher.revision, teacher.think)
    stops = stop_ids(teacher.model, chat.tokenizer, teacher.revision)
    return VllmTeacher(name, chat, stops, length, lambda: EngineProcess(python, arguments), teacher)


class VllmTeacher:
    """See distill.records.TeacherBackend."""

    def __init__(
        self,
        name: str,
        chat: ChatTokenizer,
        stops: Sequence[int],
        length: int | None,
        start: Callable[[], EngineProcess],
        teacher: Teacher,
    ) -> None:
        self.id = name
        self._chat, self._stops, self._start = chat, tuple(stops), start
        self._room = teacher.batch_size + max(1, int(_AHEAD * teacher.batch_size))
        self._attempts = teacher.attempts
        self._length = length
        self._engine: EngineProcess | None = None
        self._ready = False
        self._waiting: deque[_Flight] = deque()
        self._flying: dict[str, _Flight] = {}
        self._deaths = 0  # since the last reply
        self._not_before = 0.0
        self._errors: dict[str, int] = {}

    def generate(self, asks: Asks) -> Iterator[list[Reply]]:
        """Replies as they come. Raises EngineDied, or UserError where the engine never started."""
        try:
            while True:
                replies = self._take(asks)
                self._send()
                replies += self._receive()
                if replies or not asks.closed or self._waiting or self._flying:
                    yield replies
                else:
                    return
        finally:
            self._stop()

    def states(self) -> Mapping[str, EndpointState]:
        return {"vllm": EndpointState(len(self._flying), self._room, self._ready, dict(self._errors))}

    def _take(self, asks: Asks) -> list[Reply]:
        """Draw asks into the room there is; replies are those that can be given without the engine."""
        room = self._room - len(self._waiting) - len(self._flying)
        replies: list[Reply] = []
        for ask in asks.take(min(room, _DRAWN)):
            prompt = self._chat.ids(ask.messages)
            if self._length is not None and len(prompt) >= self._length:
                replies.append(Reply(ask.id, "", "prompt_too_long", len(prompt), 0, 0, 0.0))
            else:
                self._waiting.append(_Flight(ask, prompt))
        return replies

    def _send(self) -> None:
        if self._engine is None:
            if self._waiting and time.monotonic() >= self._not_before:
                self._engine = self._start()
            return
        if not self._ready or not self._waiting:
            return
        flights = list(self._waiting)
        self._waiting.clear()
        for flight in flights:
            flight.attempts += 1
            self._flying[flight.ask.id] = flight
        self._engine.send([self._message(flight) for flight in flights])

    def _message(self, flight: _Flight) -> dict[str, Any]:
        ask = flight.ask
        room = ask.max_tokens if self._length is None else min(ask.max_tokens, self._length - len(flight.prompt))
        return {
            "id": ask.id, "request": f"{ask.id}-{flight.attempts}", "prompt": flight.prompt, "stop": self._stops,
            "temperature": ask.temperature, "top_p": ask.top_p, "seed": ask.seed, "max_tokens": room,
            "logprobs": ask.logprobs,
        }  # fmt: skip

    def _receive(self) -> list[Reply]:
        if self._engine is None:
            time.sleep(_TICK)
            return []
        replies = []
        for message in self._engine.receive(_TICK):
            if "ready" in message:
                self._ready, self._length = True, message["ready"]["max_model_len"]
                continue
            flight = self._flying.pop(message["id"])
            # vLLM's other ends, "abort" and "error", are its own trouble and no outcome.
            error = message.get("error") or (None if message["finish"] in ("stop", "length") else message["finish"])
            if error is None:
                self._deaths = 0
                replies.append(self._reply(flight, message))
            else:
                self._errors["engine"] = self._errors.get("engine", 0) + 1
                replies += self._again(flight, f"engine: {error}")
        return replies + self._bury() if self._engine.ended else replies

    def _reply(self, flight: _Flight, message: Mapping[str, Any]) -> Reply:
        ids: list[int] = message["tokens"]
        finish = message["finish"]
        if finish == "stop" and ids and ids[-1] in self._stops:
            ids = ids[:-1]
        text = self._chat.decode(ids)
        if finish == "stop" and not text.strip():
            finish = "empty"
        reasoning = self._chat.reasoning_tokens(text, ids)
        top = message.get("logprobs")
        return Reply(
            id=flight.ask.id,
            text=text,
            finish_reason=finish,
            prompt_tokens=len(flight.prompt),
            reasoning_tokens=reasoning,
            answer_tokens=len(ids) - reasoning,
            seconds=message["seconds"],
            attempts=flight.attempts,
            # Position by position with the text, so without the end-of-sequence token.
            logprobs=TopLogprobs(top["tokens"][: len(ids)], top["logprobs"][: len(ids)], ids) if top else None,
        )

    def _again(self, flight: _Flight, error: str) -> list[Reply]:
        """Ask once more, or give it up."""
        if flight.attempts < self._attempts:
            self._waiting.appendleft(flight)
            return []
        prompt_tokens = len(flight.prompt)
        return [Reply(flight.ask.id, "", "failed", prompt_tokens, 0, 0, 0.0, attempts=flight.attempts, error=error)]

    def _bury(self) -> list[Reply]:
        """The engine is dead: what it had in flight is asked again, of another."""
        assert self._engine is not None
        words, never_ready = self._engine.last_words(), not self._ready
        self._stop()
        self._deaths += 1
        self._errors["engine_died"] = self._errors.get("engine_died", 0) + 1
        if never_ready and self._errors["engine_died"] == 1:
            # The first start of all: trying once more would change nothing.
            raise UserError(f"teacher.vllm: vLLM's engine did not start: {words}")
        # One ask that kills it is given up after its attempts; if that was not the cause, the engine is.
        if self._deaths > self._attempts or (never_ready and self._deaths >= STARTS):
            raise EngineDied(
                f"vLLM's engine died {self._deaths} times without a reply in between; it said last: {words}"
            )
        # GPUs give their memory back some time after a process's death.
        self._not_before = time.monotonic() + min(2.0 ** (self._deaths - 1) - 1, _MOST_BACK_OFF)
        flights, self._flying = list(self._flying.values()), {}
        return [reply for flight in reversed(flights) for reply in self._again(flight, f"engine_died: {words}")]

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.kill()
        self._engine, self._ready = None, False

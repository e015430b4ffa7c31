"""What a server answered: bodies in one piece and streams, of both APIs, read into one form.

Streams are read in blocks of many events, and events that differ from the one before in nothing but their text by one
split of the block: a reply of 2,000 events costs 2 ms instead of 10.
"""

import json
import re
import sys
from array import array
from dataclasses import dataclass, field
from operator import eq
from typing import Any

import orjson

from distill.endpoints.failures import Failure, by_event

_BLOCK = 1 << 14  # bytes of a stream that are gathered before they are read
_STRING = re.compile(rb'(?:[^"\\]|\\.)*')
_TEXT_FIELD = re.compile(rb'"(content|reasoning_content|reasoning|text)": ?"')


@dataclass
class Answer:
    """`reasoning` and `content` as the server split them, in pieces."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    separates: bool = False  # the server has a field for the reasoning, used or not
    refusal: str = ""
    finish: str | None = None
    model: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    top: int = 0  # likeliest tokens wanted at each position
    likeliest: list[tuple[str, ...]] = field(default_factory=list)  # (T, top)
    logprobs: list["array[float]"] = field(default_factory=list)  # (T, top), float32
    chosen: list[str] = field(default_factory=list)  # (T,) the tokens that were generated
    texts: int = 0  # events of a stream that brought text
    invalid: bool = False  # what came was no UTF-8, and is shown with replacement characters


class Whole:
    """A body in one piece (a Sink), of at most `most` bytes."""

    complete = False  # only its end tells

    def __init__(self, most: int, top: int = 0) -> None:
        self._most, self._size, self._top = most, 0, top
        self._pieces: list[bytes] = []

    def feed(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._most:
            raise Failure("huge_body", f"more than {self._most} bytes")
        self._pieces.append(data)

    @property
    def raw(self) -> bytes:
        return b"".join(self._pieces)

    def answer(self) -> Answer:
        raw = self.raw
        body, valid = _load(raw)
        answer = Answer(invalid=not valid, top=self._top)
        if not isinstance(body, dict):
            raise Failure("bad_json", f"a JSON {type(body).__name__}; expected an object")
        _choice(answer, body, "message")
        if not body.get("choices"):
            raise Failure("bad_json", "a reply without choices")
        return answer


class Stream:
    """Server-sent events (a Sink). Comments, such as DeepSeek's keep-alive, are passed over."""

    def __init__(self, most: int, top: int = 0) -> None:
        self._most, self._size = most, 0
        self._held: list[bytes] = []  # bytes that are not read yet
        self._held_size = 0
        self._answer = Answer(top=top)
        self._ended = False  # [DONE] came
        self._id: str | None = None
        self._ids_agree = False
        self._last_event_id = b""
        self._last_end = b""
        self._latest: object = None  # piece of text
        self._repeats = 0  # pieces that are like the one before
        self._fast = self._slow = 0  # events read by shape, and one by one
        self._shape: tuple[bytes, bytes, list[str]] | None = None  # before the text, after it, where it goes

    @property
    def complete(self) -> bool:
        return self._ended

    def feed(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._most:
            raise Failure("huge_body", f"more than {self._most} bytes")
        self._held.append(data)
        self._held_size += len(data)
        # The end and an error are not left lying; short pieces may hold the rest of either's name.
        if b"\n" in data and (self._held_size >= _BLOCK or b"[DONE]" in data or b"error" in data or len(data) < 8):
            self._read(b"".join(self._held))

    def answer(self) -> Answer:
        """What came, when nothing comes any more."""
        self._read(b"".join(self._held) + b"\n\n")
        answer = self._answer
        if not self._ended and answer.finish is None:
            raise Failure("cut", "the stream ended without [DONE] or a finish_reason", usage=answer.usage)
        tokens = answer.usage.get("completion_tokens")
        # More pieces of text than tokens: a proxy that deals the text out anew, or pieces that came twice. The latter
        # stand behind their likes.
        if isinstance(tokens, int) and 0 < answer.texts - tokens <= self._repeats and tokens > 0:
            said = f"{answer.texts} pieces of text, {self._repeats} like the one before, of {tokens} tokens"
            raise Failure("duplicated_chunks", said, usage=answer.usage)
        return answer

    def _read(self, data: bytes) -> None:
        """Read the whole lines of `data` and hold the rest."""
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        end = data.rfind(b"\n") + 1
        block, rest = data[:end], data[end:]
        self._held, self._held_size = ([rest], len(rest)) if rest else ([], 0)
        at = 0
        while at < end:
            if self._shape is not None and block.startswith(self._shape[0], at):
                at = self._run(block, at, *self._shape)
            if at < end:
                at = self._line(block, at)
        # Of many small pieces few large ones: a list of 32,000 short strings takes 2 MB.
        for pieces in (self._answer.reasoning, self._answer.content):
            if len(pieces) > 1:
                pieces[:] = ["".join(pieces)]

    def _run(self, block: bytes, at: int, before: bytes, after: bytes, pieces: list[str]) -> int:
        """Reads the events from `at` on that are `before` + text + `after`; returns where others begin.

        The texts are JSON strings, which hold no line feed: the first piece with one is where another event begins.
        """
        between = after + b"\n\n" + before
        texts = block[at + len(before) :].split(between)
        count = len(texts) - 1
        if b"\n" in b"".join(texts[:-1]):
            count = next(n for n, text in enumerate(texts) if b"\n" in text)
        last, ended, _ = texts[count].partition(after + b"\n\n")
        texts[count:] = [last] if ended and b"\n" not in last else []
        try:
            found = orjson.loads(b'["' + b'","'.join(texts) + b'"]') if texts else []
        except ValueError:
            return at
        if not found or len(found) != len(texts):  # a text that is no JSON string: let it be found out
            return at
        pieces.extend(found)
        self._answer.texts += len(found) - found.count("")
        self._repeats += sum(map(eq, found, [self._latest, *found]))
        self._latest = found[-1]
        self._fast += len(found)
        self._ids_agree = True  # the identity is part of what they have in common
        return at + len(before) + sum(map(len, texts)) + (len(texts) - 1) * len(between) + len(after) + 2

    def _line(self, block: bytes, at: int) -> int:
        """Reads the line at `at`; returns where the next one begins."""
        end = block.index(b"\n", at)
        line = block[at:end]
        if line.startswith(b"data:"):
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self._ended = True
            elif self._ended and payload:
                raise Failure("reordered_chunks", "an event after [DONE]", usage=self._answer.usage)
            elif payload and self._event(payload):
                self._learn(line)
        elif line.startswith(b"id:"):
            # An event that is sent again has the same id; no two others have.
            if line == self._last_event_id:
                raise Failure("duplicated_chunks", f"event {line[:40]!r} twice", usage=self._answer.usage)
            self._last_event_id = line
        return end + 1

    def _event(self, payload: bytes) -> bool:
        """Whether it brought nothing but text."""
        body, valid = _load(payload)
        answer = self._answer
        answer.invalid |= not valid
        if not isinstance(body, dict):
            raise Failure("bad_json", "an event that is no JSON object", usage=answer.usage)
        identity = body.get("id")
        if isinstance(identity, str) and identity:
            if self._id not in (None, identity) and self._ids_agree:
                raise Failure("mixed_stream", "an event of another reply", usage=answer.usage)
            self._ids_agree = self._ids_agree or self._id == identity
            self._id = identity
        if answer.finish is not None and payload == self._last_end:
            raise Failure("duplicated_chunks", "the end twice", usage=answer.usage)
        if (latest := _choice(answer, body, "delta")) is not None:
            self._repeats += latest == self._latest
            self._latest = latest
        if answer.finish is not None:
            self._last_end = payload
        return answer.finish is None and not answer.top and body.get("usage") is None

    def _learn(self, line: bytes) -> None:
        """The shape of an event that brought one piece of text, for `_run`."""
        self._slow += 1
        if self._slow > 32 and self._slow > self._fast:
            self._shape = None  # of a server that words each event anew
            return
        found = list(_TEXT_FIELD.finditer(line))
        if len(found) != 1:
            return
        text = _STRING.match(line, found[0].end())
        assert text is not None
        pieces = self._answer.reasoning if found[0][1].startswith(b"reasoning") else self._answer.content
        self._shape = line[: found[0].end()], line[text.end() :], pieces


def _choice(answer: Answer, body: dict[str, Any], part: str) -> str | None:
    """Add what a body, or an event, says to `answer`; `part` is where the text stands ("message" or "delta").

    Returns the text, if there is any.
    """
    if body.get("error") or body.get("object") == "error":
        raise by_event(body.get("error") or body)
    if isinstance(model := body.get("model"), str) and model:
        answer.model = model
    if isinstance(usage := body.get("usage"), dict):
        answer.usage = usage
    choices = body.get("choices")
    if not choices:
        return None
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise Failure("bad_json", "choices that are no list of objects", usage=answer.usage)
    choice = choices[0]
    if choice.get("index", 0) != 0:
        return None  # one choice was asked for
    said = choice.get(part)
    reasoning: Any = None
    if isinstance(said, dict):
        content: Any = said.get("content")
        # Some servers send both names of one thing.
        reasoning = said.get("reasoning_content") or said.get("reasoning")
        answer.separates |= "reasoning_content" in said or "reasoning" in said
        if isinstance(refusal := said.get("refusal"), str):
            answer.refusal += refusal
    else:
        content = choice.get("text")
    for text, pieces in ((reasoning, answer.reasoning), (content, answer.content)):
        if isinstance(text, str) and text:
            pieces.append(text)
            answer.texts += 1
        elif text is not None and not isinstance(text, str):
            raise Failure("bad_json", f"text that is a JSON {type(text).__name__}", usage=answer.usage)
    if isinstance(reasoning, str) and isinstance(content, str) and reasoning and content:
        answer.texts -= 1  # one event, and maybe one token
    if answer.finish is not None and (reasoning or content):
        raise Failure("reordered_chunks", "text after the end", usage=answer.usage)
    if isinstance(finish := choice.get("finish_reason"), str) and finish:
        answer.finish = finish
    if answer.top and isinstance(logprobs := choice.get("logprobs"), dict):
        _add_logprobs(answer, logprobs)
    return reasoning or content or None


def _add_logprobs(answer: Answer, said: dict[str, Any]) -> None:
    """Of chat (`content[].top_logprobs[]`) and completions (`top_logprobs[]`, a mapping a position).

    Kept compactly from the start: 32,000 positions of 20 take 11 MB, as they came 200.
    """
    try:
        if "top_logprobs" in said:
            rows = [list((row or {}).items()) for row in said["top_logprobs"] or []]
            chosen = said.get("tokens") or []
        else:
            entries = said.get("content") or []
            chosen = [entry["token"] for entry in entries]
            rows = [[(item["token"], item["logprob"]) for item in entry["top_logprobs"]] for entry in entries]
        answer.chosen += map(sys.intern, chosen)
        for row in rows:
            best = sorted(row, key=lambda pair: -pair[1])[: answer.top]
            answer.likeliest.append(tuple(sys.intern(token) for token, _ in best))
            answer.logprobs.append(array("f", [logprob for _, logprob in best]))
    except (KeyError, TypeError, AttributeError) as error:
        raise Failure("bad_json", f"logprobs in an unknown form ({error})", usage=answer.usage) from None


def _load(raw: bytes) -> tuple[Any, bool]:
    """(what the JSON says, whether it is Unicode text)."""
    try:
        return orjson.loads(raw), True
    except ValueError:
        pass
    try:
        value = json.loads(raw.decode(errors="replace"))
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise Failure("bad_json", str(error)[:100]) from None
    try:
        text.encode()
        raw.decode()
    except UnicodeError:
        # Half a surrogate pair, or bytes that are no UTF-8.
        return json.loads(text.encode(errors="replace")), False
    # What orjson alone refuses: NaN and numbers beyond 64 bits.
    return value, True

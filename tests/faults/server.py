"""An OpenAI-compatible server that misbehaves as told, and writes down what it answered to whom.

    python -m tests.faults.server --log FILE --faults http_500,cut --share 0.3

Runs as a process of its own, so that neither a kill of the client nor its load touches it. Which requests go wrong
follows from the seed, the sample (its `seed` field, which no two samples share) and how often that was asked before;
what goes wrong is dealt like cards, so that all faults come up equally often. Each good answer carries
"#name/sample/attempt#", so that a trace can be held against the log: a JSON line as a request comes, and one as its
answer has been handed over whole.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

MODEL = "faulty-r1"
CLOCK_SKEW = -5 * 3600.0  # of the server's clock, in its Date and in its Retry-After
HUGE = 1 << 30
OUTCOMES = {  # faults that are an answer: recorded under this name, and not asked again
    "content_filter": "content_filter", "content_filter_400": "content_filter", "refusal": "refusal",
    "empty": "empty", "overflow": "prompt_too_long", "invalid_utf8": "invalid_utf8", "length": "length",
}  # fmt: skip
HARMLESS = ("drip",)  # odd, but the whole answer is there
FAILURES = (
    "http_429", "http_429_seconds", "http_429_date", "http_500", "http_503", "hang", "hang_midway", "endless_drip",
    "cut", "reset", "bad_json", "wrong_model", "huge",
)  # fmt: skip
STREAMED_FAILURES = ("duplicated", "duplicated_end")  # of a reply in one piece there is nothing to send twice
_MARKED = b"@BYTE@"


class Request:
    """One request: its fields, and where its reply goes."""

    def __init__(self, body: dict[str, Any], chat: bool, mark: str, writer: asyncio.StreamWriter) -> None:
        self.stream, self.chat, self.mark, self.writer = bool(body.get("stream")), chat, mark, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def answer(self) -> tuple[str, str]:
        """(reasoning, response): long enough to be cut in many places."""
        reasoning = f"Let me think. #{self.mark}# " + "One and one is two, carry none. " * 20
        return reasoning.strip(), "The sum is 3 €.\n\n\\boxed{3}"


def _head(status: int, body: bytes, **more: str) -> bytes:
    lines = {"content-type": "application/json", "content-length": str(len(body)), "date": _date(0.0), **more}
    headers = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} Whatever\r\n{headers}\r\n".encode() + body


def _date(ahead: float) -> str:
    return formatdate(time.time() + CLOCK_SKEW + ahead, usegmt=True)


def _error(status: int, message: str, code: str | None = None, **headers: str) -> bytes:
    body = json.dumps({"error": {"message": message, "type": "server_error", "code": code}}).encode()
    return _head(status, body, **headers)


def reply_bytes(
    request: Request, *, model: str = MODEL, finish: str = "stop", twice: str | None = None, **message: Any
) -> list[bytes]:
    """The whole reply as its header and the pieces that a server would send one after another.

    twice: "text" or "end", which of a stream's events are sent again.
    """
    reasoning, response = request.answer()
    parts = {"reasoning_content": reasoning, "content": response, **message}
    full = "\n</think>\n\n".join(text for name in ("reasoning_content", "content") if (text := parts[name]))
    head = {"id": f"r{request.mark}", "created": 1, "model": model}
    if not request.stream:
        content = {"message": {"role": "assistant", **parts}} if request.chat else {"text": full}
        choices = [{"index": 0, **content, "finish_reason": finish}]
        return [_head(200, _encode(head | {"choices": choices, "usage": _usage(150)}))]
    deltas: list[dict[str, Any]] = []
    if request.chat:
        for name in ("reasoning_content", "content", "refusal"):
            deltas += [{"delta": {name: piece}} for piece in _pieces(parts.get(name) or "")]
    else:
        deltas += [{"text": piece} for piece in _pieces(full)]
    events = [_encode(head | {"choices": [{"index": 0, **delta, "finish_reason": None}]}) for delta in deltas]
    last: dict[str, Any] = {"delta": {}} if request.chat else {"text": ""}
    end = [_encode(head | {"choices": [{"index": 0, **last, "finish_reason": finish}]})]
    usage = _encode(head | {"choices": [], "usage": _usage(len(deltas))})  # as vLLM: a token an event
    if twice == "text":
        events[len(events) // 2 :] = [events[len(events) // 2], *events[len(events) // 2 :]]
    elif twice == "end":
        end *= 2
    lines = [b"data: %b\n\n" % event for event in [*events, *end, usage, b"[DONE]"]]
    start = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    start += f"date: {_date(0.0)}\r\n\r\n"
    return [start.encode(), *(b"%x\r\n%b\r\n" % (len(line), line) for line in lines), b"0\r\n\r\n"]


def _encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode().replace(_MARKED, b"\xff\xfe")


def _pieces(text: str) -> list[str]:
    return [text[i : i + 40] for i in range(0, len(text), 40)]


def _usage(generated: int) -> dict[str, int]:
    return {"prompt_tokens": 9, "completion_tokens": generated, "total_tokens": 9 + generated}


async def good(request: Request) -> None:
    await request.send(b"".join(reply_bytes(request)))


async def hang(request: Request) -> None:
    await asyncio.sleep(3600)


async def hang_midway(request: Request) -> None:
    data = b"".join(reply_bytes(request))
    await request.send(data[: len(data) // 2])
    await asyncio.sleep(3600)


async def drip(request: Request) -> None:
    """The whole answer, in small pieces with pauses."""
    data = b"".join(reply_bytes(request))
    size = len(data) // 12 + 1
    for start in range(0, len(data), size):
        await request.send(data[start : start + size])
        await asyncio.sleep(0.02)


async def endless_drip(request: Request) -> None:
    """Never silent for long, and never done."""
    pieces = reply_bytes(request)
    if request.stream:
        await request.send(pieces[0])
    else:
        await request.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n")
    while True:
        await request.send(b"d\r\n: keep-alive\n\r\n" if request.stream else b" ")
        await asyncio.sleep(0.05)


async def cut(request: Request) -> None:
    """The connection ends, orderly, where the answer does not."""
    data = b"".join(reply_bytes(request))
    place = random.Random(request.mark).randrange(1, len(data) - len(b"data: [DONE]") - 20)
    await request.send(data[:place])
    request.writer.close()


async def reset(request: Request) -> None:
    sock = request.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.writer.transport.abort()


async def bad_json(request: Request) -> None:
    broken = b'{"id": "r1", "choices": [{"message": {"content": "half'
    if not request.stream:
        await request.send(_head(200, broken))
        return
    line = b"data: " + broken + b"\n\n"
    pieces = reply_bytes(request)
    await request.send(b"".join([*pieces[:3], b"%x\r\n%b\r\n" % (len(line), line), *pieces[3:]]))


async def huge(request: Request) -> None:
    """A gigabyte of blanks, or as much of it as the client will have."""
    blanks = b" " * (1 << 20)
    head = reply_bytes(request)[0] if request.stream else _head(200, b"", content_length=str(HUGE))
    await request.send(head)
    for _ in range(HUGE // len(blanks)):
        await request.send(b"%x\r\n%b\r\n" % (len(blanks), blanks) if request.stream else blanks)


def _send(make: Callable[[Request], bytes]) -> Callable[[Request], Awaitable[None]]:
    return lambda request: request.send(make(request))


def _reply(**changes: Any) -> Callable[[Request], Awaitable[None]]:
    return lambda request: request.send(b"".join(reply_bytes(request, **changes)))


ANSWERS: dict[str, Callable[[Request], Awaitable[None]]] = {
    "http_429": _send(lambda r: _error(429, "Too many requests")),
    "http_429_seconds": _send(lambda r: _error(429, "Too many requests", retry_after="1")),
    "http_429_date": _send(lambda r: _error(429, "Too many requests", retry_after=_date(1.0))),
    "http_500": _send(lambda r: _error(500, "Internal error")),
    "http_503": _send(lambda r: _error(503, "Model is loading")),
    "hang": hang,
    "hang_midway": hang_midway,
    "drip": drip,
    "endless_drip": endless_drip,
    "cut": cut,
    "reset": reset,
    "bad_json": bad_json,
    "wrong_model": _reply(model="some-other-model"),
    "huge": huge,
    "duplicated": _reply(twice="text"),
    "duplicated_end": _reply(twice="end"),
    "invalid_utf8": _reply(content=f"The sum is {_MARKED.decode()} \\boxed{{3}}"),
    "empty": _reply(reasoning_content="", content=""),
    "content_filter": _reply(content="", finish="content_filter"),
    "content_filter_400": _send(lambda r: _error(400, "The response was filtered", "content_filter")),
    "refusal": _reply(reasoning_content="", content="", refusal="I cannot help with that."),
    "overflow": _send(
        lambda r: _error(400, "This model's maximum context length is 64 tokens. However, you requested 99 tokens.",
                         "context_length_exceeded")
    ),
    "length": _reply(content="", finish="length"),
}  # fmt: skip


class Server:
    def __init__(self, options: argparse.Namespace) -> None:
        self.faults = [name for name in options.faults.split(",") if name]
        unknown = set(self.faults) - ANSWERS.keys()
        assert not unknown, f"no such faults: {unknown}"
        self.name, self.share, self.seed, self.latency = options.name, options.share, options.seed, options.latency
        self.asked: Counter[Any] = Counter()
        self._log = os.open(options.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._deck: list[str] = []

    def log(self, **line: Any) -> None:
        os.write(self._log, json.dumps(line).encode() + b"\n")

    def fault(self, mark: str) -> str | None:
        if not self.faults or random.Random(f"{self.seed}/{mark}").random() >= self.share:
            return None
        if not self._deck:
            self._deck = random.sample(self.faults, len(self.faults))
        return self._deck.pop()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                line, *headers = head.decode("latin-1").split("\r\n")
                fields = dict(h.lower().split(": ", 1) for h in headers if ": " in h)
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                await self.answer(line.split()[1], body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if not path.endswith("completions"):
            models = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
            writer.write(_head(200, json.dumps(models).encode()))
            return
        fields = json.loads(body)
        sample = fields.get("seed")
        attempt = self.asked[sample]
        self.asked[sample] += 1
        mark = f"{self.name}/{sample}/{attempt}"
        request = Request(fields, "/chat/" in path, mark, writer)
        fault = self.fault(mark)
        about = {"sample": sample, "mark": mark, "fault": fault}
        self.log(event="asked", time=time.time(), **about)
        await asyncio.sleep(self.latency * random.uniform(0.5, 1.5))
        await (ANSWERS[fault] if fault else good)(request)
        self.log(event="answered", time=time.time(), **about)


async def serve(options: argparse.Namespace) -> None:
    server = Server(options)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    listening = await asyncio.start_server(server.connected, "127.0.0.1", options.port, backlog=1024, limit=1 << 22)
    print(f"listening {listening.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    os._exit(0)  # connections may hang for good, which is what they are for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", required=True)
    parser.add_argument("--name", default="a", help="in the answers' marks, where there are several servers")
    parser.add_argument("--faults", default="", help=f"comma-separated, of: {', '.join(ANSWERS)}")
    parser.add_argument("--share", type=float, default=0.3, help="share of the requests that go wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.005, help="seconds to a good answer, half to one and a half")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()

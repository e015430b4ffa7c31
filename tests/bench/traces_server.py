"""An OpenAI-compatible server that answers at once, for measuring clients: python -m tests.bench.traces_server

It does the least that HTTP asks for, on a bare asyncio.Protocol: requests are cut out of the buffer by their
Content-Length, the body is searched rather than parsed, and replies are made beforehand but for the answer, so that
one core answers far more requests than a client in Python can send (`traces_load` measures how many). Several
processes share the port by SO_REUSEPORT.

A prompt that holds 'What is A plus B?' is answered with a trace in R1's form: reasoning, then the sum in a box, which
is wrong for every fifth A. Streamed replies come as events in chunked encoding, `--chunk` characters each, all sent
in one go: vLLM's `--stream-interval 16` at infinite speed.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

MODEL = "instant-r1"
_SUM = re.compile(rb"What is (\d+) plus (\d+)\?")
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_MARK = "@ANSWER@"
_THOUGHTS = (
    "Okay, so I need to add the two numbers. Let me set them one above the other and go digit by digit. "
    "Wait, is there a carry here? Let me check that again, from the right. Hmm, that seems right. "
)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def reply_text(characters: int) -> tuple[str, str]:
    """(reasoning, response) of about that many characters together, the answer marked."""
    response = f"The sum is found digit by digit.\n\n**Answer:** \\boxed{{{_MARK}}}"
    return (_THOUGHTS * (characters // len(_THOUGHTS) + 1))[: max(characters - len(response), 1)].strip(), response


class Replies:
    """The bytes of every kind of reply, made once; only the answer is put in."""

    def __init__(self, characters: int, chunk: int) -> None:
        reasoning, response = reply_text(characters)
        self.tokens = (len(reasoning) + len(response)) // 4
        usage = {"prompt_tokens": 40, "completion_tokens": self.tokens, "total_tokens": 40 + self.tokens}
        head = {"id": "r", "created": 1, "model": MODEL}
        message = {"role": "assistant", "content": response, "reasoning_content": reasoning}
        full_text = f"{reasoning}\n</think>\n\n{response}"
        self._plain = {
            True: _split(head | {"object": "chat.completion", "choices": [_choice(message=message)], "usage": usage}),
            False: _split(head | {"object": "text_completion", "choices": [_choice(text=full_text)], "usage": usage}),
        }
        deltas = [{"role": "assistant", "content": ""}]
        deltas += [{"reasoning_content": reasoning[i : i + chunk]} for i in range(0, len(reasoning), chunk)]
        deltas += [{"content": response}]
        pieces = [full_text[: -len(response)][i : i + chunk] for i in range(0, len(full_text) - len(response), chunk)]
        self._streamed = {
            True: _events(head | {"object": "chat.completion.chunk"}, [{"delta": d} for d in deltas], usage),
            False: _events(head | {"object": "text_completion"}, [{"text": t} for t in [*pieces, response]], usage),
        }

    def make(self, request: bytes, chat: bool) -> bytes:
        asked = _SUM.search(request)
        answer = b"0"
        if asked:
            first, second = int(asked[1]), int(asked[2])
            answer = b"%d" % (first + second + (first % 5 == 0))
        if _STREAM.search(request):
            before, event, after = self._streamed[chat]
            event = event.replace(_MARK.encode(), answer)
            return b"".join((before, b"%x\r\n" % len(event), event, after))
        before, after = self._plain[chat]
        length = len(before) + len(answer) + len(after)
        return b"".join((_JSON_HEAD, b"%d\r\n\r\n" % length, before, answer, after))


_JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
_EVENT_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def _choice(finish: str | None = "stop", **content: Any) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish}


def _split(body: dict[str, Any]) -> tuple[bytes, bytes]:
    before, _, after = json.dumps(body, ensure_ascii=False).encode().partition(_MARK.encode())
    return before, after


def _events(head: dict[str, Any], parts: list[dict[str, Any]], usage: dict[str, int]) -> tuple[bytes, bytes, bytes]:
    """(header and all chunks before the answer's, the answer's event without its chunk header, what follows)."""
    last: dict[str, Any] = {"delta": {}} if "delta" in parts[0] else {"text": ""}
    bodies = [head | {"choices": [_choice(None, **part)]} for part in parts]
    bodies += [head | {"choices": [_choice(**last)]}, head | {"choices": [], "usage": usage}]
    events = [b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n" for body in bodies]
    events.append(b"data: [DONE]\n\n")
    at = next(i for i, event in enumerate(events) if _MARK.encode() in event)
    before = _EVENT_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events[:at])
    after = b"\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events[at + 1 :]) + b"0\r\n\r\n"
    return before, events[at], after


class Connection(asyncio.Protocol):
    def __init__(self, replies: Replies) -> None:
        self.replies, self.buffer = replies, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        data = self.buffer + data if self.buffer else data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(data, 0, end + 2)
            whole = end + 4 + (int(found[1]) if found else 0)
            if len(data) < whole:
                break
            self.answer(data[:whole])
            data = data[whole:]
        self.buffer = data

    def answer(self, request: bytes) -> None:
        line = request[: request.index(b"\r")]
        if b"completions" in line:
            self.transport.write(self.replies.make(request, chat=b"/chat/" in line))
        else:  # GET /v1/models, /health
            body = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode()
            self.transport.write(_JSON_HEAD + b"%d\r\n\r\n%b" % (len(body), body))


async def serve(port: int, replies: Replies) -> None:
    """Until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    await loop.create_server(lambda: Connection(replies), sock=listener, backlog=4096)
    print(f"listening {listener.getsockname()[1]}", flush=True)
    await stop.wait()


class InstantServer:
    """The server in processes of its own; a context manager."""

    def __init__(self, *, characters: int, chunk: int, processes: int = 1) -> None:
        self.port = 0
        self.children: list[subprocess.Popen[str]] = []
        for _ in range(processes):
            command = [sys.executable, "-m", "tests.bench.traces_server", "--port", str(self.port)]
            command += ["--characters", str(characters), "--chunk", str(chunk)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self.children.append(child)
            assert child.stdout is not None
            self.port = int(child.stdout.readline().split()[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def cpu_seconds(self) -> float:
        """Of all its processes so far."""
        ticks = 0
        for child in self.children:
            with open(f"/proc/{child.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "InstantServer":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.terminate()
        for child in self.children:
            child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--characters", type=int, default=4000, help="length of a reply, about four a token")
    parser.add_argument("--chunk", type=int, default=64, help="characters a streamed event")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(options.port, Replies(options.characters, options.chunk)))


if __name__ == "__main__":
    main()

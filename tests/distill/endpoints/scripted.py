"""A real HTTP/1.1 server on loopback whose answers a test decides, and what drives the client in tests."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from distill.endpoints import open_endpoints
from distill.recipe_teacher import Teacher
from distill.records import Ask, Reply

Answer = Callable[["Request"], None]


class Request:
    """One request: what was asked, and the ways to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], number: int) -> None:
        self.handler, self.body, self.number = handler, body, number
        self.path, self.headers = handler.path, handler.headers

    def send(self, status: int, data: bytes | str | dict[str, Any], **headers: str) -> None:
        raw = json.dumps(data).encode() if isinstance(data, dict) else data.encode() if isinstance(data, str) else data
        self.handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(raw)))
        self.handler.end_headers()
        self.handler.wfile.write(raw)

    def say(self, content: str = "two\n</think>\n\n4", finish: str = "stop", **more: Any) -> None:
        """A reply as asked for: streamed or whole, by the chat or the completions API."""
        if self.body["stream"]:
            self.stream([*deltas(content), {"finish_reason": finish}], **more)
        elif self.path.endswith("/chat/completions"):
            self.send(200, whole({"content": content}, finish, **more))
        else:
            self.send(200, whole({}, finish, **more) | {"choices": [{"text": content, "finish_reason": finish}]})

    def stream(self, events: Iterable[dict[str, Any] | bytes | float], done: bool = True, **more: Any) -> None:
        """Events: deltas (or {"finish_reason"}), raw bytes, or a pause in seconds."""
        self.begin_stream()
        for event in events:
            if isinstance(event, float):
                time.sleep(event)
            else:
                self.chunk(event if isinstance(event, bytes) else sse(as_event(event, self.path, **more)))
        if done:
            self.chunk(sse(as_event({}, self.path, **more) | {"choices": [], "usage": more.get("usage", USAGE)}))
            self.chunk(b"data: [DONE]\n\n")
        self.end_stream()

    def begin_stream(self) -> None:
        self.handler.send_response(200)
        self.handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.handler.send_header("Transfer-Encoding", "chunked")
        self.handler.end_headers()

    def chunk(self, data: bytes) -> None:
        self.handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.handler.wfile.flush()

    def end_stream(self) -> None:
        self.handler.wfile.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """Close the connection here."""
        self.handler.close_connection = True


USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}


def deltas(text: str, size: int = 3, name: str = "content") -> list[dict[str, Any]]:
    return [{name: text[i : i + size]} for i in range(0, len(text), size)]


def as_event(delta: dict[str, Any], path: str, model: str = "m", **_: Any) -> dict[str, Any]:
    finish = delta.get("finish_reason")
    said = {name: value for name, value in delta.items() if name != "finish_reason"}
    choice = {"index": 0, "delta": said, "finish_reason": finish}
    if not path.endswith("/chat/completions"):
        choice = {"index": 0, "text": said.get("content", ""), "finish_reason": finish}
    return {"id": "one", "object": "chat.completion.chunk", "model": model, "choices": [choice]}


def sse(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def whole(message: dict[str, Any], finish: str = "stop", model: str = "m", usage: Any = USAGE) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"id": "one", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage}


class Server:
    """Keeps what it was asked in `asked`, and `answer`s it; GET /models lists `models`."""

    def __init__(self, answer: Answer | None = None, port: int = 0) -> None:
        self.answer = answer or (lambda request: request.say())
        self.asked: list[Request] = []
        self.models: list[dict[str, Any]] | None = [{"id": "m"}]
        self.open = 0
        self.most_open = 0
        self._connections: set[socket.socket] = set()
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                server._connections.add(self.connection)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    request = Request(self, body, len(server.asked))
                    server.asked.append(request)
                    server.open += 1
                    server.most_open = max(server.most_open, server.open)
                try:
                    server.answer(request)
                except OSError:
                    self.close_connection = True  # the client is gone
                finally:
                    with lock:
                        server.open -= 1

            def do_GET(self) -> None:
                found = {"data": server.models} if server.models is not None else {"error": "none"}
                Request(self, {}, -1).send(200 if server.models is not None else 404, found)

            def log_message(self, *_: object) -> None:
                pass

        class Threads(ThreadingHTTPServer):
            request_queue_size = 1024
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # connections that the client gave up

        self.http = Threads(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """As a killed process: nobody listens, and open connections are reset."""
        self.http.shutdown()
        self.http.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Source:
    """Asks, as the stage gives them out."""

    def __init__(self, asks: Iterable[Ask]) -> None:
        self.left = list(asks)
        self.more = False  # whether others may come later

    def take(self, most: int) -> list[Ask]:
        taken, self.left = self.left[:most], self.left[most:]
        return taken

    @property
    def closed(self) -> bool:
        return not self.left and not self.more


def ask(number: int = 0, **more: Any) -> Ask:
    fields: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 100, "seed": 7 + number} | more
    return Ask(f"a{number}", [{"role": "user", "content": f"question {number}"}], **fields)


def teacher(*servers: Server, **more: Any) -> Teacher:
    endpoints = more.pop("endpoints", None) or [{"url": server.url} for server in servers]
    return Teacher.model_validate({"kind": "endpoint", "model": "m", "endpoints": endpoints} | more)


def replies(given: Teacher, asks: int | Iterable[Ask] = 1) -> dict[str, Reply]:
    """All of them, by id; each exactly once."""
    source = Source(map(ask, range(asks)) if isinstance(asks, int) else asks)
    found: dict[str, Reply] = {}
    for batch in open_endpoints(given).generate(source):
        for reply in batch:
            assert reply.id not in found, f"{reply.id} came twice"
            found[reply.id] = reply
    return found

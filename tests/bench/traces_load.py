"""How many requests a second a server answers at most: a load generator that reads only where a reply ends.

As the server under it, it speaks HTTP on a bare asyncio.Protocol and looks at nothing else, so what it reaches is the
server's own limit, or close to it. Runs as a process of its own: python -m tests.bench.traces_load PORT REQUESTS
"""

import argparse
import asyncio
import json
import re
import time
from typing import cast

from tests.bench.traces_server import MODEL, loop_factory

_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)


def request_bytes(number: int, stream: bool) -> bytes:
    prompt = f"What is {number} plus 7?\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "temperature": 0.6, "top_p": 0.95}
    extra = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    data = json.dumps(body | {"max_tokens": 32768, "seed": number} | extra).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


class Asker(asyncio.Protocol):
    """One connection: sends the next request when the last one's reply is complete."""

    def __init__(self, work: "Work") -> None:
        self.work = work
        self.missing = 0  # bytes of a reply whose length is known
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass
        self.next()

    def next(self) -> None:
        if self.work.left == 0:
            self.transport.close()
            return
        self.work.left -= 1
        self.missing, self.tail = 0, b""
        self.transport.write(request_bytes(self.work.left, self.work.stream))

    def data_received(self, data: bytes) -> None:
        if self.work.stream:
            self.tail = (self.tail + data)[-5:]
            done = self.tail == b"0\r\n\r\n"
        else:
            if not self.missing:
                found = _LENGTH.search(data)
                assert found, "a reply without a Content-Length in its first packet"
                self.missing = data.index(b"\r\n\r\n") + 4 + int(found[1])
            self.missing -= len(data)
            done = self.missing == 0
        if done:
            self.work.finished += 1
            self.next()

    def connection_lost(self, error: Exception | None) -> None:
        self.work.open -= 1
        if self.work.open == 0:
            self.work.done.set_result(None)


class Work:
    def __init__(self, requests: int, connections: int, stream: bool) -> None:
        self.left, self.open, self.stream = requests, connections, stream
        self.finished = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


async def ask(port: int, requests: int, connections: int, stream: bool) -> dict[str, float]:
    work = Work(requests, connections, stream)
    start, cpu = time.perf_counter(), time.process_time()
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(lambda: Asker(work), "127.0.0.1", port)
    await work.done
    assert work.finished == requests
    wall = time.perf_counter() - start
    return {"rate": requests / wall, "wall": wall, "cpu": time.process_time() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("requests", type=int)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--stream", action="store_true")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        print(json.dumps(runner.run(ask(options.port, options.requests, options.connections, options.stream))))


if __name__ == "__main__":
    main()

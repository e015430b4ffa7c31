"""One server: its connections, its limit, its health, and what it is told and says."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from functools import cached_property

import orjson

from distill import __version__
from distill.endpoints.answers import Answer, Stream, Whole
from distill.endpoints.dial import Address
from distill.endpoints.failures import Failure, Stale, by_status
from distill.endpoints.http import Connection, Head
from distill.endpoints.limit import Limit
from distill.endpoints.names import Names
from distill.endpoints.requests import PATHS, Bodies
from distill.errors import UserError
from distill.recipe_teacher import Endpoint as Settings
from distill.recipe_teacher import Teacher
from distill.records import Ask, EndpointState

clock = time.monotonic
_MOST_COMPLAINT = 1 << 18  # bytes
_IN_A_ROW = 8  # failures after which nobody is taken to be there
_PROBE_SECONDS = 10.0
_PROBE_PAUSES = 0.5, 30.0  # first and longest, doubling between
# A dead host is noticed within half a minute, as idle_timeout must leave room for a long prompt.
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


class Endpoint:
    """All of it runs in one event loop; `up` says whether it is given work."""

    def __init__(self, teacher: Teacher, settings: Settings, place: str, name: str) -> None:
        self.settings, self.place, self.name = settings, place, name
        self.address = Address(settings.url, f"{place}.url")
        self.model = settings.model or teacher.model
        self.names = Names(self.model)
        self._teacher = teacher
        self.key = read_key(settings, place)
        self.bodies: Bodies  # set by the client, which knows the tokenizer
        self.errors: Counter[str] = Counter()
        self.in_flight = 0
        self.up = True
        self.out: str | None = None  # why it gets no more work at all
        self.downs = 0  # how often it went down
        self.answered = 0  # requests that brought a reply, since the start
        self.refusals = 0
        self.turn = 0.0  # of the weighted turns: the lowest is next
        self._row = 0  # failures in a row
        self._full = False  # whether it went down for having too much to do
        self._pause = _PROBE_PAUSES[0]
        self._free: list[Connection] = []
        self._busy: dict[Connection, tuple[float, int]] = {}  # since when; bytes already told to the limit
        self.limit = self._new_limit()

    def _new_limit(self) -> Limit:
        return Limit(self.settings.concurrency, self._teacher.stream, clock())

    @property
    def room(self) -> int:
        return self.limit.value - self.in_flight if self.up else 0

    @property
    def state(self) -> EndpointState:
        return EndpointState(self.in_flight, self.limit.value, self.up, dict(self.errors))

    # Asking.

    async def ask(self, ask: Ask, max_tokens: int) -> tuple[Answer, float]:
        """What the server answers, and the seconds it took. Raises what distill.endpoints.failures holds."""
        start = clock()
        request, most = self._post(self.bodies.write(ask, max_tokens)), self._most(ask, max_tokens)
        sink = await self._exchange(request, most, self._teacher.stream, ask.logprobs)
        return sink.answer(), clock() - start

    def _most(self, ask: Ask, max_tokens: int) -> int:
        """Bytes that a reply may have: several times what the longest one has in the wordiest server's JSON."""
        token = (1024 if self._teacher.stream else 256) + 256 * (ask.logprobs + 1 if ask.logprobs else 0)
        return (1 << 18) + max_tokens * token

    async def _exchange(self, request: bytes, most: int, streams: bool = False, top: int = 0) -> Whole | Stream:
        """The body of an answer with status 200, of at most `most` bytes."""
        stale = False
        while True:
            connection = (None if stale else self._kept()) or await self._connect()
            # A list, since the sink is chosen when the head is there.
            chosen: list[Whole | Stream] = []
            start = clock()

            def choose(head: Head, chosen: list[Whole | Stream] = chosen, start: float = start) -> Whole | Stream:
                if head.status == 200:
                    self.limit.accepted(clock() - start)
                # Not all servers name their streams; none calls one JSON.
                whole = head.status != 200 or not streams or b"json" in head.headers.get(b"content-type", b"")
                size = most if head.status == 200 else _MOST_COMPLAINT
                chosen.append(Whole(size, top) if whole else Stream(size, top))
                return chosen[-1]

            self._busy[connection] = (start, 0)
            try:
                head = await connection.exchange(request, choose)
            except Stale:
                stale = True
                continue
            finally:
                _, told = self._busy.pop(connection)
                self.limit.flowed(connection.received - told)
                if connection.reusable:
                    self._free.append(connection)
                else:
                    connection.close()
            sink = chosen[-1]
            if head.status != 200:
                assert isinstance(sink, Whole)
                raise by_status(head.status, head.headers, sink.raw)
            return sink

    def _kept(self) -> Connection | None:
        while self._free:
            connection = self._free.pop()
            if connection.reusable:
                return connection
        return None

    async def _connect(self) -> Connection:
        connection = await self.address.open(clock)
        connection.keep_alive(_KEEPALIVE)
        return connection

    def _post(self, body: bytes) -> bytes:
        return b"%bContent-Length: %d\r\n\r\n%b" % (self._post_head, len(body), body)

    @cached_property
    def _post_head(self) -> bytes:
        accept = "text/event-stream" if self._teacher.stream else "application/json"
        return self._head("POST", PATHS[self._teacher.api], {"Accept": accept, "Content-Type": "application/json"})

    def _head(self, method: str, path: str, more: Mapping[str, str]) -> bytes:
        """The request line and the headers, to which others may be added; each with its line end."""
        headers = {**self.address.headers(), "User-Agent": f"distill/{__version__}", "Accept-Encoding": "identity"}
        headers |= more
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        lines = [f"{method} {self.address.target(path)} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        return "".join(f"{line}\r\n" for line in lines).encode("latin-1")

    # Health.

    def succeeded(self) -> None:
        self._row, self._pause = 0, _PROBE_PAUSES[0]
        self.answered += 1

    def failed(self, failure: Failure) -> bool:
        """Count it; whether this takes the endpoint down."""
        self.errors[failure.kind] += 1
        self._row += failure.kind != "local"
        # A server that is full turns many away in a row, and serves the others; but not when one is left.
        full = failure.overload and failure.kind != "timeout" and self.limit.value > 1
        if not self.up or not (failure.kind == "connect" or (self._row >= _IN_A_ROW and not full)):
            return False
        self.up = False
        self.downs += 1
        self._full = failure.overload
        return True

    async def wait_until_back(self) -> None:
        """Probe with growing pauses until GET /models is answered; then the endpoint is up. Its limit is found anew,
        unless it was overload that took it down."""
        while True:
            await asyncio.sleep(self._pause * random.uniform(0.75, 1.25))
            self._pause = min(2 * self._pause, _PROBE_PAUSES[1])
            try:
                async with asyncio.timeout(_PROBE_SECONDS):
                    await self.models()
            except (Failure, TimeoutError):
                continue
            except Exception:  # a refusal is an answer too, and the next request will tell what is wrong
                pass
            break
        self._row = 0
        if not self._full:
            self.limit = self._new_limit()
        self.up = self.out is None

    async def models(self) -> list[dict[str, object]]:
        """The entries of GET /models. Raises as `ask` does."""
        request = self._head("GET", "/models", {"Accept": "application/json"}) + b"\r\n"
        sink = await self._exchange(request, 1 << 22)
        try:
            entries = orjson.loads(sink.raw if isinstance(sink, Whole) else b"")["data"]
            return [entry for entry in entries if isinstance(entry, dict)]
        except (ValueError, KeyError, TypeError):
            return []

    def sweep(self, now: float) -> None:
        """To be called several times a second: time outs, and what the limit must know of streams."""
        for connection, (since, told) in list(self._busy.items()):
            connection.hurry(now)
            if connection.received != told:
                self.limit.flowed(connection.received - told)
                self._busy[connection] = (since, connection.received)
            if now - connection.last > self._teacher.idle_timeout:
                said = f"nothing came for {self._teacher.idle_timeout:g} s"
                connection.fail(Failure("timeout", said, overload=True))
            elif now - since > self._teacher.timeout:
                connection.fail(Failure("timeout", f"not done after {self._teacher.timeout:g} s", overload=True))
        self.limit.tick(now, self.in_flight)

    def close(self) -> None:
        for connection in [*self._free, *self._busy]:
            connection.close()
        self._free.clear()


def read_key(settings: Settings, place: str) -> str | None:
    """The key, from the environment. Raises UserError that names the variable if there is none in it."""
    if settings.key is None:
        return None
    key = os.environ.get(settings.key, "").strip()
    if not key:
        raise UserError(f"{place}.key: the environment variable {settings.key} is not set; it must hold the key")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{place}.key: the environment variable {settings.key} holds what no HTTP header can")
    return key

"""How a call is answered once its reply object knows what was asked: whole or as a stream, until the client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from teacher.requests import Completion
from teacher.server.errors import ApiError
from teacher.server.generate import Served, engine_requests, room_for
from teacher.server.logprobs import Scores, passes
from teacher.server.protocol import CompletionBody
from teacher.server.replies import CompletionReply, Reply
from teacher.server.worker import Batch, Worker

# Proxies must pass the events on as they come.
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Calls:
    """Answers calls with the worker's engine."""

    def __init__(self, served: Served, worker: Worker) -> None:
        self._served, self._worker = served, worker

    async def answer(self, request: Request, reply: Reply) -> Response:
        if reply.body.stream:
            batch = await self._submit(reply)
            return StreamingResponse(
                self._events(batch, reply), media_type="text/event-stream", headers=_STREAM_HEADERS
            )
        return await _unless_gone(request, self._whole(reply))

    async def _submit(self, reply: Reply) -> Batch:
        return await self._worker.submit(engine_requests(self._served, reply.body, reply.prompts, reply.id))

    async def _whole(self, reply: Reply) -> Response:
        body = reply.body
        scoring = isinstance(body, CompletionBody) and body.echo and body.logprobs is not None
        if isinstance(reply, CompletionReply) and reply.body.max_tokens == 0:
            for prompt in reply.prompts:
                room_for(self._served, body, len(prompt.ids))
            done = reply.nothing_generated()
        else:
            done = await self._finish(await self._submit(reply))
        scores = None
        if scoring:
            assert isinstance(reply, CompletionReply)
            scores = await self._score([reply.sequence(n, c) for n, c in enumerate(done)], reply.body.logprobs or 0)
        return Response(_dump(reply.whole(done, scores)), media_type="application/json")

    async def _finish(self, batch: Batch) -> list[Completion]:
        done: dict[str, Completion] = {}
        try:
            async for updates in batch:
                done |= {u.id: u.completion for u in updates if u.completion is not None}
        finally:
            self._worker.cancel(batch)
        return [done[request.id] for request in batch.requests]

    async def _score(self, sequences: Sequence[Sequence[int]], top: int) -> list[Scores]:
        scores: dict[int, Scores] = {}
        for one_pass in passes(self._served.model, sequences, top):
            scores |= dict(await self._worker.call(one_pass))
        return [scores[n] for n in range(len(sequences))]

    async def _events(self, batch: Batch, reply: Reply) -> AsyncIterator[bytes]:
        """Server-sent events. What fails in the middle is an event too: the status has long been sent."""
        done: dict[str, Completion] = {}
        try:
            for chunk in reply.first_chunks():
                yield _event(chunk)
            async for updates in batch:
                events = []
                for update in updates:
                    if (news := reply.chunk(batch.index[update.id], update)) is not None:
                        events.append(_event(news))
                    if update.completion is not None:
                        done[update.id] = update.completion
                if events:
                    yield b"".join(events)
            if reply.with_usage:
                yield _event(reply.usage_chunk([done[request.id] for request in batch.requests]))
        except ApiError as error:
            yield _event(error.body())
        finally:
            self._worker.cancel(batch)
        yield b"data: [DONE]\n\n"


def _dump(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _event(body: Any) -> bytes:
    return b"data: " + _dump(body) + b"\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The work's response; if the client hangs up before it is ready, the work is cancelled."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else Response(status_code=499)  # nobody reads it
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _hung_up(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

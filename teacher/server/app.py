"""The routes: what each takes, and what stands in its way."""

from __future__ import annotations

import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from teacher.server.calls import Calls
from teacher.server.errors import ApiError, engine_failed, shutting_down
from teacher.server.generate import Served
from teacher.server.metrics import CONTENT_TYPE, Metrics
from teacher.server.prompts import Prompts
from teacher.server.protocol import ChatBody, CompletionBody, TokenizeBody, parse
from teacher.server.replies import ChatReply, CompletionReply
from teacher.server.worker import EngineLike, Worker

MOST_BYTES = 32 * 2**20  # of a body


def create_app(engine: EngineLike, served: Served, most_requests: int, api_key: str | None = None) -> FastAPI:
    """The application; it starts the engine's thread when it starts. `most_requests` may wait or run at one time."""
    metrics = Metrics(served.names[0])
    worker = Worker(engine, metrics, most_requests)
    prompts = Prompts(served.tokenizer, served.vocab_size)
    calls = Calls(served, worker)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()
        prompts.close()

    async def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    app = FastAPI(title="distill teacher serve", lifespan=lifespan, openapi_url=None)
    app.state.worker = worker
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)
    started = int(time.time())
    guarded: Any = {"dependencies": [Depends(authorised)], "response_model": None}

    @app.get("/health", response_model=None)
    async def health() -> Response:
        if worker.error is not None:
            raise engine_failed(503)
        if worker.draining:
            raise shutting_down()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_model=None)
    async def metrics_page() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE)

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "distill",
            "root": served.names[0],  # the same behind every name, by which clients know that the others are aliases
            "max_model_len": served.max_len,
        }

    @app.get("/v1/models", **guarded)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in served.names]})

    @app.get("/v1/models/{name:path}", **guarded)
    async def model(name: str) -> Response:
        served.check_name(name)
        return JSONResponse(card(name))

    @app.post("/v1/chat/completions", **guarded)
    async def chat(request: Request) -> Response:
        body = parse(ChatBody, await _json(request))
        served.check_name(body.model)
        worker.check_room(body.n)
        reply = ChatReply(served, f"chatcmpl-{secrets.token_hex(12)}", body, [await prompts.of_chat(body.messages)])
        return await calls.answer(request, reply)

    @app.post("/v1/completions", **guarded)
    async def completions(request: Request) -> Response:
        body = parse(CompletionBody, await _json(request))
        served.check_name(body.model)
        batched = isinstance(body.prompt, list) and bool(body.prompt) and not isinstance(body.prompt[0], int)
        worker.check_room(body.n * (len(body.prompt) if batched else 1))
        found = await prompts.of_completion(body)
        return await calls.answer(request, CompletionReply(served, f"cmpl-{secrets.token_hex(12)}", body, found))

    @app.post("/tokenize", **guarded)
    async def tokenize(request: Request) -> Response:
        body = parse(TokenizeBody, await _json(request))
        served.check_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "expected either prompt or messages", "prompt")
        if body.messages is not None:
            prompt = await prompts.of_chat(body.messages)
        else:
            prompt = await prompts.of_text(body.prompt or "", body.add_special_tokens)
        return JSONResponse({"tokens": prompt.ids, "count": len(prompt.ids), "max_model_len": served.max_len})

    return app


async def _json(request: Request) -> Any:
    """The body. Read here, not by FastAPI: curl's default content type is accepted, and its size is bounded."""
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > MOST_BYTES:
            raise ApiError(413, f"the body is larger than {MOST_BYTES} bytes")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="malformed_json") from None


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _http_error(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    known = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(known.body(), error.status_code, error.headers)


async def _unforeseen(request: Request, error: Exception) -> Response:
    """A bug of ours: the server logs its traceback, the client learns no more than that."""
    return JSONResponse(ApiError(500, "internal error; the server's log says how").body(), 500)

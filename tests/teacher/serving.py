"""A server for tests: the application under a real uvicorn on loopback, in a thread; a tiny random model behind it."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from teacher import load_model
from teacher.engine import Engine
from teacher.requests import Request
from tests import tiny

TINY_R1 = Path(__file__).parents[2] / "teacher" / "models" / "tiny-r1"
NAME = "tiny-random"


@cache
def random_model() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_teacher(folder, seed=3)
        return load_model(folder)


@cache
def tokenizer() -> Any:
    return tiny.tokenizer()


def random_engine(**options: Any) -> Engine:
    return Engine(random_model(), tokenizer(), **options)


def served(**changes: Any) -> Any:
    from teacher.server.generate import Served

    fields = {"names": (NAME, "alias"), "model": random_model(), "tokenizer": tokenizer(), "max_len": 512,
              "vocab_size": 263, "stop_ids": (257,)}  # fmt: skip
    return Served(**(fields | changes))


def prompt_ids(text: str) -> list[int]:
    """Of a user's message, as the server must render it."""
    chat = tokenizer().apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer()(chat, add_special_tokens=False)["input_ids"]


def expected(*requests: Request) -> list[Any]:
    """What the engine alone makes of the requests."""
    done = {completion.id: completion for completion in random_engine().generate(requests)}
    return [done[request.id] for request in requests]


@dataclass(frozen=True)
class Running:
    url: str  # without /v1
    worker: Any

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


@contextmanager
def serve(engine: Any, what: Any, most_requests: int = 1000, api_key: str | None = None) -> Iterator[Running]:
    import uvicorn

    from teacher.server.app import create_app

    app = create_app(engine, what, most_requests, api_key)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
        started = threading.Event()

        async def run() -> None:
            serving = asyncio.ensure_future(server.serve(sockets=[listening]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.005)
            started.set()
            await serving

        thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        thread.start()
        assert started.wait(30)
        try:
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.worker)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """(T - 1, V): of each token after the first, by a plain forward pass."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)

"""uvicorn around the application. SIGTERM and Ctrl-C end it quietly: no new calls, those in flight get some seconds."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from teacher.server.errors import shutting_down


def bind(host: str, port: int) -> socket.socket:
    """A socket that is not listening yet; port 0 takes a free one. Raises OSError that names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except OSError as error:
        server.close()
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {error.strerror}") from error
    return server


def serve(app: FastAPI, server: socket.socket, grace: float, ready: Callable[[], None]) -> None:
    """Serve on a bound socket until SIGTERM or SIGINT; calls in flight then have `grace` seconds.

    `ready` is called when the first call may come. For the main thread: elsewhere signals cannot be caught.
    """
    # Uvicorn raises the signal again when it has ended: that is no failure. Before it starts, it is no failure either.
    before = {sig: signal.signal(sig, lambda *_: sys.exit(0)) for sig in (signal.SIGTERM, signal.SIGINT)}
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=round(grace) + 5, server_header=False)
    try:
        _Server(config, grace, ready).run(sockets=[server])
    except SystemExit as end:
        if end.code:
            raise
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._grace, self._ready = grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but what is not done in time gets an answer that says so, before its connection is cut."""
        worker: Any = self.config.app.state.worker  # type: ignore[union-attr]
        worker.draining = True
        timer = asyncio.get_running_loop().call_later(self._grace, worker.fail_all, shutting_down())
        await super().shutdown(sockets)
        timer.cancel()

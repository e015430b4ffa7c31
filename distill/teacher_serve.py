"""`distill teacher serve`: a model folder behind OpenAI's chat and completions endpoints, on our engine."""

import json
import os
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fastapi import FastAPI

# The key that clients must send; from the environment, so that it stands in no shell history and no process list.
KEY = "DISTILL_API_KEY"


@dataclass(frozen=True)
class ServeOptions:
    """See the command's options."""

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    reasoning_parser: Literal["deepseek_r1", "none"] = "deepseek_r1"
    batch_size: int = 256
    max_len: int | None = None
    cache_tokens: int | None = None
    speculate: int = 0
    max_waiting: int = 1024
    dtype: str | None = None
    device: str = "cpu"
    grace: float = 30


def run(model: str, options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ValueError for a model or an option that cannot be served."""
    from distill.embedded import teacher_folder
    from teacher.server.run import bind, serve

    # What costs nothing to find wrong comes before minutes of loading.
    teacher_folder(model, field="MODEL")
    socket = bind(options.host, options.port)
    with socket:
        app, name, about = _on_our_engine(model, options)
        host, port = socket.getsockname()[:2]
        serve(app, socket, options.grace, lambda: _say_where(host, port, name, about))
    print("stopped", file=sys.stderr)


def _on_our_engine(model: str, options: ServeOptions) -> "tuple[FastAPI, str, str]":
    """The application, the model's name and a word on its size."""
    from distill.embedded import open_model
    from teacher.engine import Engine
    from teacher.native.build import obstacle
    from teacher.native.runner import suits
    from teacher.server.app import create_app
    from teacher.server.generate import Served, read_defaults

    opened = open_model(model, options.dtype, options.device, field="MODEL")
    # Small checkpoints are bfloat16 like large ones, but only in float32 do they run in C, many times as fast.
    if options.dtype is None and suits(opened.model) and obstacle() is None:
        opened.model.float()
    names = options.names or (opened.folder.resolve().name,)
    engine = Engine(
        opened.model,
        opened.tokenizer,
        options.batch_size,
        options.max_len,
        cache_tokens=options.cache_tokens,
        speculate=options.speculate,
    )
    served = Served(
        names=names,
        model=opened.model,
        tokenizer=opened.tokenizer,
        max_len=engine.max_len,
        vocab_size=opened.model.config.vocab_size,
        stop_ids=opened.stop_ids,
        defaults=read_defaults(opened.folder),
        parser=options.reasoning_parser,
    )
    app = create_app(engine, served, options.batch_size + options.max_waiting, os.environ.get(KEY) or None)
    cache = engine.stats().cache_tokens_total
    about = f"{engine.max_len} tokens a sequence, {options.batch_size} sequences at once, a cache of {cache} tokens"
    about += f", in {engine.runs_in}"
    return app, names[0], about


def _say_where(host: str, port: int, name: str, about: str) -> None:
    """On standard error: nothing of it is a result."""
    address = ip_address(host)
    reachable = f"[{host}]" if address.version == 6 else host
    if address.is_unspecified:
        reachable = "localhost"
    url = f"http://{reachable}:{port}/v1"
    body = json.dumps(
        {
            "model": name,
            "messages": [
                {"role": "user", "content": "State the final answer to the following arithmetic problem: 12 + 30 ="}
            ],
        }
    )
    key = f' -H "Authorization: Bearer ${KEY}"' if os.environ.get(KEY) else ""
    lines = [
        f"{name} listens on {url} ({about})",
        f"try: curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
    ]
    if not key and not address.is_loopback:
        lines.append(f"without a key: whoever reaches this port may use it; {KEY} in the environment asks for one")
    print(*lines, sep="\n", file=sys.stderr, flush=True)

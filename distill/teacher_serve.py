"""`distill teacher serve`: a model, or a recipe's teacher, behind OpenAI's chat and completions endpoints.

Our engine serves what it is made for, models of DeepSeek-V3's architecture that one device holds; vLLM the rest.
"""

import json
import os
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from distill.errors import UserError
from distill.shipped import SHIPPED_MODELS, resolve_config, resolve_model

if TYPE_CHECKING:
    from fastapi import FastAPI

    from distill.recipe import Sampling, Teacher
    from distill.serving.serve import VllmOptions

# The key that clients must send; from the environment, so that it stands in no shell history and no process list.
KEY = "DISTILL_API_KEY"


@dataclass(frozen=True)
class ServeOptions:
    """See the command's options."""

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    reasoning_parser: Literal["deepseek_r1", "none"] = "deepseek_r1"
    batch_size: int | None = None  # None: the recipe's, else 256
    max_len: int | None = None
    cache_tokens: int | None = None
    speculate: int | None = None
    max_waiting: int = 1024
    dtype: str | None = None
    experts: Literal["fp8"] | None = None
    weights: Literal["fp8"] | None = None
    device: str | None = None
    grace: float = 30


def run(
    what: str,
    overrides: list[str],
    options: ServeOptions,
    vllm: "VllmOptions",
    engine: Literal["auto", "own", "vllm"] = "auto",
) -> None:
    """Serve until SIGTERM or Ctrl-C; `what` is a model or a recipe. Raises ValueError for what cannot be served."""
    teacher, sampling = _wanted(what, overrides, options)
    if engine == "own" or (engine == "auto" and _ours(teacher, teacher.device)):
        if vllm.output != "run" or vllm.nodes > 1:
            raise UserError("--print, --script and --nodes are about vLLM: ask for it with --engine vllm")
        _serve_ourselves(teacher, options)
    else:
        from distill.serving import serve
        from distill.serving.command import Listening

        if options.cache_tokens is not None:
            raise UserError("--cache-tokens: vLLM's cache follows from the memory; teacher.vllm.args can say otherwise")
        listening = Listening(options.host, options.port, options.names, options.reasoning_parser)
        serve.run(teacher, sampling, listening, vllm)


def _wanted(what: str, overrides: list[str], options: ServeOptions) -> "tuple[Teacher, Sampling | None]":
    """The teacher section that says what to serve, and how long its traces get; the command's options go before it."""
    from distill.recipe_load import load_recipe
    from distill.serving.serve import teacher_for

    settings = {
        "batch_size": options.batch_size, "dtype": options.dtype, "device": options.device, "experts": options.experts,
        "weights": options.weights,
    }  # fmt: skip
    stated = {name: value for name, value in settings.items() if value is not None}
    tuned = {"max_model_len": options.max_len, "speculate": options.speculate}
    tuned = {name: value for name, value in tuned.items() if value is not None}
    config = resolve_config(what)
    folder = config if config is not None and config.is_dir() else None
    if config is None or what in SHIPPED_MODELS or (folder and not (folder / "recipe.yaml").is_file()):
        section, sampling = teacher_for(what, overrides), None
    else:
        recipe = load_recipe(what, overrides)
        section, sampling = recipe.teacher, recipe.sampling
    engine = section.vllm.model_copy(update=tuned)
    return section.model_copy(update={**stated, "vllm": engine}), sampling


def _ours(teacher: "Teacher", device: str) -> bool:
    """Whether our engine is meant for it. What is no model at all is left to our engine's messages."""
    from distill.doctor import memory_bytes
    from distill.serving.gpus import gpu_memories
    from distill.serving.model import read_facts

    found = resolve_model(teacher.model)
    if not isinstance(found, Path):
        return "/" not in found
    if not (found / "config.json").is_file():
        return True
    text = (found / "config.json").read_text(encoding="utf-8", errors="replace")
    if '"deepseek_v3"' not in text:
        return False
    memory = max(gpu_memories(), default=0) if device.startswith("cuda") else memory_bytes()
    return not memory or (read_facts(teacher.model).weights or 0) < memory


def _serve_ourselves(teacher: "Teacher", options: ServeOptions) -> None:
    from distill.embedded import teacher_folder
    from teacher.server.run import bind, serve

    # What costs nothing to find wrong comes before minutes of loading.
    teacher_folder(teacher.model, field="MODEL")
    socket = bind(options.host, options.port)
    with socket:
        app, name, about = _on_our_engine(teacher, options)
        host, port = socket.getsockname()[:2]
        serve(app, socket, options.grace, lambda: _say_where(host, port, name, about))
    print("stopped", file=sys.stderr)


def _on_our_engine(teacher: "Teacher", options: ServeOptions) -> "tuple[FastAPI, str, str]":
    """The application, the model's name and a word on its size."""
    from distill.embedded import open_model
    from teacher.engine import Engine
    from teacher.native.build import obstacle
    from teacher.native.runner import suits
    from teacher.server.app import create_app
    from teacher.server.generate import Served, read_defaults

    opened = open_model(teacher.model, teacher.dtype, teacher.device, "MODEL", teacher.experts, teacher.weights)
    # Small checkpoints are bfloat16 like large ones, but only in float32 do they run in C, many times as fast.
    if teacher.dtype is None and suits(opened.model) and obstacle() is None:
        opened.model.float()
    names = options.names or (opened.folder.resolve().name,)
    engine = Engine(
        opened.model,
        opened.tokenizer,
        teacher.batch_size,
        teacher.vllm.max_model_len,
        cache_tokens=options.cache_tokens,
        speculate=teacher.vllm.speculate,
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
    app = create_app(engine, served, teacher.batch_size + options.max_waiting, os.environ.get(KEY) or None)
    cache = engine.stats().cache_tokens_total
    about = f"{engine.max_len} tokens a sequence, {teacher.batch_size} sequences at once, a cache of {cache} tokens"
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

"""vLLM's engine in a process of its own: asks in by standard input, replies out, a JSON line each.

Run by path in the environment that has vLLM, which need not have our packages: hence nothing of distill is
imported here. The first line in is the engine's arguments; lines out are {"ready": ...} once, then for each ask
{"id", "tokens", "finish", "seconds", "logprobs"} or {"id", "error"}; {"fatal": ...} comes before a death that
could be foreseen. AsyncLLM and not LLM, because it takes asks while it generates and serves data parallelism.
"""

# mypy: disable-error-code="import-not-found"
# vLLM is in another environment than the one that is checked.

import asyncio
import json
import os
import signal
import sys
import threading
import time
from typing import IO, Any

FATAL = 3
_GIB = 2**30


def main() -> None:
    # What vLLM and its processes print must not mix with the replies.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    arguments: dict[str, Any] = json.loads(sys.stdin.readline())
    try:
        asyncio.run(_serve(arguments, out))
    except Exception as error:
        _say(out, {"fatal": f"{type(error).__name__}: {error}"})
        _end_group()


async def _serve(arguments: dict[str, Any], out: IO[str]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    if current_platform.is_cpu():
        arguments, environment = on_cpu(arguments, _latent(arguments))
        os.environ.update(environment)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    loop = asyncio.get_running_loop()
    died: asyncio.Future[None] = loop.create_future()
    tasks: set[asyncio.Task[None]] = set()

    def begin(line: str) -> None:
        task = loop.create_task(_answer(engine, json.loads(line), out, died))
        tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(tasks.discard)

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(begin, line)
        _end_group()  # whoever asked is gone; with it the GPUs' memory must come back

    _say(out, {"ready": {"max_model_len": engine.model_config.max_model_len}})
    threading.Thread(target=read, daemon=True).start()
    await died


async def _answer(engine: Any, ask: dict[str, Any], out: IO[str], died: "asyncio.Future[None]") -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.exceptions import EngineDeadError

    wanted = ask["logprobs"]
    start = time.monotonic()
    try:
        # Token ids in and out: templates, stop tokens and counting are the asker's, so that all teachers share them.
        settings = SamplingParams(
            temperature=ask["temperature"],
            top_p=ask["top_p"],
            seed=ask["seed"],
            max_tokens=ask["max_tokens"],
            stop_token_ids=ask["stop"],
            logprobs=wanted or None,
            flat_logprobs=bool(wanted),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for result in engine.generate({"prompt_token_ids": ask["prompt"]}, settings, ask["request"]):
            done = result.outputs[0]
        reply = {"id": ask["id"], "tokens": list(done.token_ids), "finish": done.finish_reason}
        if wanted:
            reply["logprobs"] = likeliest(done.logprobs, wanted)
        _say(out, {**reply, "seconds": time.monotonic() - start})
    except EngineDeadError as error:
        if not died.done():
            died.set_exception(error)
    except Exception as error:
        _say(out, {"id": ask["id"], "error": f"{type(error).__name__}: {error}"})


def likeliest(flat: Any, count: int) -> dict[str, list[list[Any]]]:
    """The `count` likeliest tokens of each position and their log-probabilities, likeliest first.

    vLLM lists the drawn token first, wherever it ranks, and then the likeliest.
    """
    ids: list[list[int]] = []
    values: list[list[float]] = []
    for first, end in zip(flat.start_indices, flat.end_indices, strict=True):
        best = dict(zip(flat.token_ids[first:end], flat.logprobs[first:end], strict=True))
        chosen = sorted(best, key=best.__getitem__, reverse=True)[:count]
        ids.append(chosen)
        values.append([best[token] for token in chosen])
    return {"tokens": ids, "logprobs": values}


def on_cpu(arguments: dict[str, Any], latent: tuple[int, int] | None) -> tuple[dict[str, Any], dict[str, str]]:
    """(arguments, environment) with which vLLM's CPU build (0.32) is right, where the recipe does not decide it.

    Eager rotary embedding mishandles DeepSeek's three-dimensional queries unless RoPE is scaled: log-probabilities are
    off by 2 to 5, without an error. Attention over latents has kernels for the published sizes alone; `latent` are
    the model's (kv_lora_rank, qk_rope_head_dim), None for other attention. And the default share of memory is refused
    on a machine that also does something else.
    """
    changed = dict(arguments)
    compilation = changed.get("compilation_config", {})
    if changed.get("enforce_eager") and isinstance(compilation, dict):
        changed["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"], **compilation}
    if not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & changed.keys():
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        changed["kv_cache_memory_bytes"] = min(free // 4, 4 * _GIB)
    return changed, {} if latent in (None, (512, 64)) else {"VLLM_MLA_DISABLE": "1"}


def _latent(arguments: dict[str, Any]) -> tuple[int, int] | None:
    from transformers import PretrainedConfig

    config = PretrainedConfig.get_config_dict(
        arguments["model"], revision=arguments.get("revision"), trust_remote_code=False
    )[0]
    return (config["kv_lora_rank"], config["qk_rope_head_dim"]) if config.get("kv_lora_rank") else None


def _say(out: IO[str], message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _end_group() -> None:
    """End this process and those that vLLM started; it was started as the leader of a group of its own."""
    sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(FATAL)


if __name__ == "__main__":
    main()

"""The sides that tests/bench/traces.py compares with ours, each as a child process in its own environment.

    python -m tests.bench.traces_children SIDE URL PROMPTS OUT CONCURRENCY [--stream] [--replicas N]

PROMPTS is a JSONL file of {"prompt": ...}. A child imports what it needs, says "ready", waits for a line, works, and
says how many samples it finished as one JSON line. Imports nothing of this project.
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

MODEL = "instant-r1"
SAMPLING = {"temperature": 0.6, "top_p": 0.95}
MAX_TOKENS = 32768


class Channel:
    """What the parent reads: the first stdout. Everything else that a library prints goes to the log, stderr."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self) -> None:
        print("ready", file=self._file, flush=True)
        sys.stdin.readline()

    def done(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self._file, flush=True)
        sys.stdin.readline()


def read_prompts(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


def bare(options: argparse.Namespace, channel: Channel) -> None:
    """The least that gets replies into a file: aiohttp, and a line appended. No retries, no fsync, no checks."""
    import aiohttp
    import uvloop

    async def content(response: aiohttp.ClientResponse) -> dict[str, Any]:
        if not options.stream:
            reply: dict[str, Any] = await response.json()
            return reply
        message = {"reasoning_content": "", "content": ""}
        last: dict[str, Any] = {}
        async for line in response.content:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                event = json.loads(line[6:])
                for choice in event["choices"]:
                    last = choice
                    for key, text in choice["delta"].items():
                        if key in message:
                            message[key] += text
        return {"choices": [{"message": message, "finish_reason": last["finish_reason"]}]}

    async def run(prompts: list[str]) -> int:
        finished = 0
        work = iter(prompts)
        url = f"{options.url}/chat/completions"

        async def worker() -> None:  # as many as requests in flight: cheaper than a task a prompt behind a semaphore
            nonlocal finished
            for prompt in work:
                body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **SAMPLING}
                async with session.post(url, json=body | {"max_tokens": MAX_TOKENS, "stream": options.stream}) as got:
                    reply = await content(got)
                file.write(json.dumps({"prompt": prompt, "reply": reply}) + "\n")
                finished += 1

        connector = aiohttp.TCPConnector(limit=0)
        with open(options.out / "bare.jsonl", "w", encoding="utf-8") as file:
            async with aiohttp.ClientSession(connector=connector) as session:
                await asyncio.gather(*(worker() for _ in range(options.concurrency)))
        return finished

    prompts = read_prompts(options.prompts)
    channel.ready()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        channel.done(finished=runner.run(run(prompts)))


def open_r1(options: argparse.Namespace, channel: Channel) -> None:
    """Step for step what open-r1's scripts/generate_reasoning.py does: a task a prompt, as many as `concurrency` at
    once, a pause of up to a tenth of a second before each request, and the line appended through a thread, under a
    lock, to a file that is opened for it."""
    import hashlib
    import random

    import aiofiles
    import aiohttp
    import uvloop
    from tqdm import tqdm

    async def run(prompts: list[str]) -> int:
        lock = asyncio.Lock()
        active: set[asyncio.Task[None]] = set()

        async def one(prompt: str) -> None:
            await asyncio.sleep(random.uniform(0.0, 0.1))
            body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **SAMPLING}
            async with session.post(f"{options.url}/chat/completions", json=body | {"max_tokens": MAX_TOKENS}) as got:
                reply = await got.json(content_type=None)
            choice = reply["choices"][0]
            row = {
                "prompt": prompt, "generations": [choice["message"]["content"]],
                "finish_reasons": [choice["finish_reason"]], "api_metadata": [reply["usage"]],
            }  # fmt: skip
            async with lock, aiofiles.open(options.out / "traces.jsonl", mode="a") as file:
                await file.write(json.dumps(row) + "\n")
                await file.flush()
            bar.set_postfix(active=len(active), refresh=False)
            bar.update(1)

        connector = aiohttp.TCPConnector(limit=options.concurrency, ttl_dns_cache=300, keepalive_timeout=3600)
        with tqdm(total=len(prompts)) as bar:
            async with aiohttp.ClientSession(connector=connector) as session:
                for prompt in prompts:
                    hashlib.md5(prompt.encode()).hexdigest()  # it looks up here what an earlier start has finished
                    while len(active) >= options.concurrency:
                        _, active = await asyncio.wait(active, return_when=asyncio.FIRST_COMPLETED)
                    active.add(asyncio.create_task(one(prompt)))
                await asyncio.gather(*active)
            return int(bar.n)

    prompts = read_prompts(options.prompts)
    channel.ready()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        channel.done(finished=runner.run(run(prompts)))


def curator(options: argparse.Namespace, channel: Channel) -> None:
    """Bespoke Curator's OpenAI back end, its rate limits set out of the way and its shows off."""
    os.environ |= {
        "CURATOR_DISABLE_CACHE": "1", "CURATOR_DISABLE_RICH_DISPLAY": "1", "TELEMETRY_ENABLED": "0",
        "CURATOR_CACHE_DIR": str(options.out), "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }  # fmt: skip
    import litellm

    # Curator counts tokens with tiktoken, whose files come from the network; litellm ships the one it needs.
    os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(litellm.__file__).parent / "litellm_core_utils" / "tokenizers")
    from bespokelabs import curator as library
    from datasets import Dataset

    class Ask(library.LLM):
        def prompt(self, row: dict[str, Any]) -> str:
            return str(row["prompt"])

        def parse(self, row: dict[str, Any], response: str) -> dict[str, Any]:
            return {"prompt": row["prompt"], "response": response}

    llm = Ask(
        model_name=MODEL,
        backend="openai",
        generation_params=SAMPLING | {"max_tokens": MAX_TOKENS},
        backend_params={
            "base_url": options.url, "api_key": "none", "max_concurrent_requests": options.concurrency,
            "max_requests_per_minute": 10**8, "max_tokens_per_minute": 10**12,
        },
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": prompt} for prompt in read_prompts(options.prompts)])
    channel.ready()
    channel.done(finished=len(llm(rows).dataset))


def distilabel(options: argparse.Namespace, channel: Channel) -> None:
    """A pipeline of two steps: the rows, and TextGeneration through OpenAILLM, `replicas` processes of it."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "DISTILABEL_LOG_LEVEL": "WARNING"}
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts, StepResources
    from distilabel.steps.tasks import TextGeneration

    rows = [{"instruction": prompt} for prompt in read_prompts(options.prompts)]
    with Pipeline(name="bench", cache_dir=options.out) as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=options.concurrency)
        generate = TextGeneration(
            llm=OpenAILLM(
                model=MODEL, base_url=options.url, api_key="none",
                generation_kwargs=SAMPLING | {"max_new_tokens": MAX_TOKENS},
            ),
            input_batch_size=options.concurrency,
            resources=StepResources(replicas=options.replicas),
            add_raw_input=False,
            add_raw_output=False,
        )  # fmt: skip
        load >> generate
    channel.ready()
    result = pipeline.run(use_cache=False)
    channel.done(finished=len(result["default"]["train"]))


SIDES = {"bare": bare, "open-r1": open_r1, "curator": curator, "distilabel": distilabel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("url")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("concurrency", type=int)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--replicas", type=int, default=1)
    SIDES[(options := parser.parse_args()).side](options, Channel())


if __name__ == "__main__":
    main()

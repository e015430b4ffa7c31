"""What tests/bench/engine.py measures of our engine alone, each in a process of its own:

    python -m tests.bench.engine_ours speculation|cache|memory|concurrency '{"model": ..., "prompts": [[ids]], ...}'

The settings can also come on stdin ("-"). The last line of stdout is the result as JSON; progress goes to stderr.
"""

import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


def load(settings: Settings) -> Any:
    import torch

    from teacher import load_model

    torch.set_num_threads(settings.get("threads", 1))
    return load_model(settings["model"], dtype=getattr(torch, settings["dtype"]))


def request(number: int, prompt: list[int], length: int, **more: Any) -> Any:
    from teacher.requests import Request

    fields = {"temperature": 0.6, "top_p": 0.95, "seed": number, "max_tokens": length}
    return Request(str(number), prompt, **(fields | more))


def speculation(settings: Settings) -> Settings:
    """Batch 1: plain decoding and 1 to 4 drafted tokens, one request after the other, in rounds one after the other.

    Sampled at the published settings and greedy, to each one's own end. Every draft length must bring the tokens of
    plain decoding. Acceptance by position comes from a pass of its own that streams every step: position i is accepted
    if the step kept more than i tokens; `chain` is the share of steps, `alone` the share of those whose earlier drafts
    were right. Steps that the end of a request cut short are left out, except from `engine`, the engine's own count.
    """
    from teacher.engine import Engine

    model, prompts = load(settings), settings["prompts"]
    found: Settings = {}
    for sampling, temperature in (("sampled", 0.6), ("greedy", 0.0)):
        requests = [request(n, ids, settings["length"], temperature=temperature) for n, ids in enumerate(prompts)]
        engines = {
            drafts: Engine(model, batch_size=1, max_len=settings["max_len"], speculate=drafts, threads=1)
            for drafts in range(settings["most_drafts"] + 1)
        }
        speeds: dict[int, list[tuple[float, float]]] = {drafts: [] for drafts in engines}
        texts: dict[int, list[list[int]]] = {}
        for turn in range(settings["rounds"] + 1):  # the first warms up
            for drafts, engine in engines.items():
                wall, cpu = time.perf_counter(), time.process_time()
                texts[drafts] = [next(iter(engine.generate([one]))).token_ids for one in requests]
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                tokens = sum(map(len, texts[drafts])) + len(requests)  # the end token is drawn too
                if turn:
                    speeds[drafts].append((tokens / wall, tokens / cpu))
        rows = []
        for drafts, engine in engines.items():
            stats = engine.stats()
            wall_rates, cpu_rates = zip(*speeds[drafts], strict=True)
            ratios = [a[0] / b[0] for a, b in zip(speeds[drafts], speeds[0], strict=True)]
            cpu_ratios = [a[1] / b[1] for a, b in zip(speeds[drafts], speeds[0], strict=True)]
            rows.append({
                "drafts": drafts, "tokens_per_second": spread(wall_rates), "tokens_per_cpu_second": spread(cpu_rates),
                "against_plain": spread(ratios), "against_plain_cpu": spread(cpu_ratios),
                "identical": sum(a == b for a, b in zip(texts[drafts], texts[0], strict=True)),
                "requests": len(requests),
                "acceptance": {"engine": stats.accepted / stats.drafted} | accepted(engine, requests) if drafts else {},
            })  # fmt: skip
        found[sampling] = rows
    return found


def accepted(engine: Any, requests: list[Any]) -> Settings:
    """Acceptance by draft position over all whole steps."""
    from dataclasses import replace

    kept: Counter[int] = Counter()
    for one in requests:
        engine.add(replace(one, stream=True))
        first = True
        while engine.has_work:
            for update in engine.step():
                # The first token comes from the prompt; the last step is cut short by the end.
                if not first and update.completion is None:
                    kept[len(update.token_ids)] += 1
                first = False
    steps = sum(kept.values())
    reached = [sum(count for tokens, count in kept.items() if tokens > i) for i in range(engine.speculate + 1)]
    chain = [reached[i] / max(1, steps) for i in range(1, engine.speculate + 1)]
    alone = [reached[i] / max(1, reached[i - 1]) for i in range(1, engine.speculate + 1)]
    return {"chain": chain, "alone": alone, "tokens_a_step": sum(t * n for t, n in kept.items()) / max(1, steps)}


def cache(settings: Settings) -> Settings:
    """Bytes a cached token: how much more memory all of torch's tensors take in an engine with room for more tokens.

    The number of sequences and all else stays, so the difference is the cache. Told against the formula,
    layers x (kv_lora_rank + qk_rope_head_dim) x bytes a value, with the draft module's layer if it drafts.
    """
    from teacher.engine import Engine

    model, found = load(settings), {}
    config = model.config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    for drafts in (0, 1):
        sizes = []
        for tokens in (4096, 8192):
            before = tensor_bytes()
            engine = Engine(model, batch_size=64, max_len=512, cache_tokens=tokens, speculate=drafts, threads=1)
            sizes.append((tensor_bytes() - before, engine.stats().cache_tokens_total))
            del engine
        (small, few), (large, many) = sizes
        layers = config.num_hidden_layers + (drafts > 0)
        heads = config.num_attention_heads
        plain = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        size = model.lm_head.weight.element_size()
        found["drafting" if drafts else "plain"] = {
            "measured": (large - small) / (many - few), "formula": layers * width * size,
            "whole": large / many, "expanded_keys_and_values": layers * plain * size,
        }  # fmt: skip
    return found


def tensor_bytes() -> int:
    """Bytes of all tensors alive, each storage counted once."""
    import gc

    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def memory(settings: Settings) -> Settings:
    """Resident memory over many short requests, read after every tenth of them. Every other prompt is a new one.

    It rises until every page of the cache has been used once and is in the index of known pages, and not from then on:
    told are the growth after the first tenth and that of the last three.
    """
    from teacher.engine import Engine

    model, total = load(settings), settings["requests"]
    prompts = settings["prompts"]
    engine = Engine(model, batch_size=256, max_len=settings["max_len"], threads=settings.get("threads", 1))
    vocabulary = sorted({token for prompt in prompts for token in prompt})

    def source() -> Any:
        for number in range(total):
            prompt = prompts[number % len(prompts)]
            if number % 2:  # distinct prompts, so that the index of known pages is put to the test
                digits = (number // len(vocabulary) ** place % len(vocabulary) for place in range(4))
                prompt = prompt[:1] + [vocabulary[digit] for digit in digits] + prompt[1:]
            yield request(number, prompt, 1 + number % 32, stop_ids=[])

    readings, start = [], time.perf_counter()
    for count, _ in enumerate(engine.generate(source()), 1):
        if count % (total // 10) == 0:
            readings.append({"requests": count, "rss_mib": rss() / 2**20})
            print(f"  {count:6,} requests  {readings[-1]['rss_mib']:7.1f} MiB", file=sys.stderr)
    seconds = time.perf_counter() - start
    growth, late = (readings[-1]["rss_mib"] - readings[n]["rss_mib"] for n in (0, 6))
    return {"readings": readings, "growth_mib": growth, "late_growth_mib": late, "seconds": seconds}


def rss() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def concurrency(settings: Settings) -> Settings:
    """First-token latency and tokens/s with a fixed number of requests in flight: whenever one ends, the next is added.

    Latency runs from `add` to the update that carries the first token, whatever the engine does meanwhile. Requests
    run to their own end. The start, when all arrive at once, is part of it; counted are the requests that ended while
    the load was full, and for tokens/s the time until then.
    """
    from teacher.engine import Engine

    model, rows = load(settings), []
    prompts = settings["prompts"]
    for load_ in settings["concurrency"]:
        engine = Engine(
            model, batch_size=256, max_len=settings["max_len"], threads=settings.get("threads", 1),
            speculate=settings.get("speculate", 0),
        )  # fmt: skip
        total = max(settings["least"], 3 * load_)
        added: dict[str, float] = {}
        latencies: list[float] = []
        tokens, number, ended = 0, 0, 0
        wall, cpu = time.perf_counter(), time.process_time()
        while ended < total:
            while number - ended < load_:
                one = request(number, prompts[number % len(prompts)], settings["length"], stream=True)
                added[one.id] = time.perf_counter()
                engine.add(one)
                number += 1
            for update in engine.step():
                now = time.perf_counter()
                if update.id in added:
                    latencies.append(now - added.pop(update.id))
                tokens += len(update.token_ids)
                if update.completion is not None:
                    ended += 1
                    tokens += update.completion.finish_reason == "stop"
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        cuts = statistics.quantiles(latencies, n=20, method="inclusive")
        rows.append({
            "concurrency": load_, "tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu,
            "first_token_ms_median": 1e3 * cuts[9], "first_token_ms_p95": 1e3 * cuts[18], "requests": ended,
        })  # fmt: skip
        median, p95 = rows[-1]["first_token_ms_median"], rows[-1]["first_token_ms_p95"]
        print(f"  {load_:4} in flight  {tokens / wall:8,.0f} tokens/s  first token {median:6.1f} ms, 95% {p95:6.1f} ms",
              file=sys.stderr)  # fmt: skip
    return {"points": rows}


def spread(values: Any) -> Settings:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


MEASURES = {"speculation": speculation, "cache": cache, "memory": memory, "concurrency": concurrency}


if __name__ == "__main__":
    text = sys.stdin.read() if sys.argv[2] == "-" else sys.argv[2]
    print(json.dumps(MEASURES[sys.argv[1]](json.loads(text))))

"""Tokens/s of our engine, transformers' generate and vLLM on the same work: what `engine.py` calls `compare`.

256 held-out problems of the quickstart, as the chat template renders them, given as token ids to every side; other 256
in each round. Two kinds of work:

fixed     128 new tokens each, greedy, ends ignored
natural   sampled at temperature 0.6 and top-p 0.95, each request as long as our engine's own sample of it was (at most
          320), whatever is said there; so every side makes the same number of tokens for each request, all kept

Each side first finds its best settings: precision, one process with one or two threads or two processes, and what
engine_peers.py lists. In the rounds the sides then take turns, another side first in each; the first round is not
measured. Prefix caches start empty. A ratio is of two sides in one round. Two lines a side: its best on two cores
however they are used, and its best as one process.

Checked: greedy tokens up to the end token equal those of transformers in float32 (after it the model says what it was
never taught, at the mercy of rounding), and the accuracy of every side's own samples to their own ends.
"""

import json
import statistics
import sys
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from tests.bench.engine_ours import spread
from tests.bench.engine_peers import Contestant, Job, Search, Settings, Timing, describe, say

REQUESTS, NEW, LONGEST, MAX_LEN, SETS = 256, 128, 320, 512, 4


def compare(options: Any, prompts: list[list[int]], problems: list[Any]) -> Job:
    eos = json.loads((Path(options.model) / "config.json").read_text())["eos_token_id"]
    base = {"model": options.model, "max_len": MAX_LEN, "eos": eos}
    pythons = {"ours": sys.executable, "transformers": sys.executable} | (
        {"vllm": options.vllm} if options.vllm else {}
    )
    if not options.vllm:
        say("vLLM is left out: --vllm and DISTILL_VLLM_PYTHON name no environment (tests/bench/vllm_env.sh makes one)")
    sets = [prompts[n * REQUESTS : (n + 1) * REQUESTS] for n in range(SETS)]
    greedy = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": False, "lengths": [NEW] * REQUESTS}
    sampled = {"temperature": 0.6, "top_p": 0.95, "seed": 0, "stop": False}

    searches = {}
    for side, python in pythons.items():
        say(f"best settings of {side}:")
        short = greedy | {"prompts": sets[0], "lengths": [NEW // 8 if options.quick else NEW // 2] * REQUESTS}
        searches[side] = Search(side, base, python, short, options.quick)
    chosen: dict[str, Settings] = {}
    for side, search in searches.items():
        chosen[side] = max(search.best.values(), key=lambda found: found[0])[1]
        chosen[f"{side}, one process"] = search.best[1][1]

    lengths, exact = references(base, sets, greedy, sampled)
    runs: dict[str, dict[str, list[Timing]]] = {name: {"fixed": [], "natural": []} for name in chosen}
    with ExitStack() as stack:
        # A side whose best is one process is run once and told twice.
        alive: dict[str, Contestant] = {}
        for name, settings in chosen.items():
            same = next((other for other in alive if chosen[other] == settings), None)
            alive[name] = alive[same] if same else stack.enter_context(Contestant(settings, pythons[settings["side"]]))
        order = [name for n, name in enumerate(chosen) if alive[name] not in list(alive.values())[:n]]
        batches = natural_batches(options, alive, chosen, sampled | {"prompts": sets[0], "lengths": lengths[0]})
        for turn in range(options.rounds + 1):
            number = turn % SETS
            jobs = {"fixed": greedy, "natural": sampled | {"lengths": lengths[number], "seed": turn}}
            for work, job in jobs.items():
                for name in order[turn % len(order) :] + order[: turn % len(order)]:
                    more = {"batch": batches[name]} if work == "natural" and name in batches else {}
                    timing = alive[name].run(job | more | {"prompts": sets[number]})
                    if turn:
                        runs[name][work].append(timing)
                        rates = f"{timing.rate:8,.0f} tokens/s {timing.tokens / timing.cpu:8,.0f} a CPU second"
                        say(f"  round {turn} {work:8} {rates}  others {timing.others:.1f}  {describe(chosen[name])}")
        own_ends = {
            name: alive[name].run(
                sampled | {"prompts": sets[1], "lengths": [LONGEST] * REQUESTS, "stop": True, "seed": 1}
            ) for name in order
        }  # fmt: skip
    for name in chosen:
        twin = next(other for other in order if alive[other] is alive[name])
        runs[name], own_ends[name] = runs[twin], own_ends[twin]
        if twin in batches:
            batches[name] = batches[twin]
    accuracy = {
        name: graded(options.model, timing.outputs, problems[REQUESTS : 2 * REQUESTS])
        for name, timing in own_ends.items()
    }
    result: Job = {
        "contestants": {},
        "ratios": {},
        "mean_natural_tokens": statistics.mean(chain.from_iterable(lengths)),
    }
    for name, settings in chosen.items():
        first = runs[name]["fixed"][0].outputs
        result["contestants"][name] = {
            "settings": settings, "natural_batch": batches.get(name), "trials": searches[settings["side"]].trials,
            "own_ends": {
                "accuracy": accuracy[name], "tokens_per_second": own_ends[name].rate,
                "mean_tokens": own_ends[name].tokens / REQUESTS,
            },
            "greedy_as_transformers_float32": {
                "to_the_end_token": sum(cut(a, eos) == cut(b, eos) for a, b in zip(first, exact, strict=True)),
                "all_tokens": sum(a == b for a, b in zip(first, exact, strict=True)), "of": REQUESTS,
            },
        } | {
            work: {
                "tokens_per_second": spread([t.rate for t in timings]), "tokens": [t.tokens for t in timings],
                "tokens_per_cpu_second": spread([t.tokens / t.cpu for t in timings]),
                "others": max(t.others for t in timings),
            } for work, timings in runs[name].items()
        }  # fmt: skip
    for name in chosen:
        side, _, rest = name.partition(", ")
        if side != "ours":
            mine = "ours" + (", " + rest if rest else "")
            result["ratios"][f"{mine} / {name}"] = {
                work: {
                    "wall": spread([a.rate / b.rate for a, b in zip(runs[mine][work], runs[name][work], strict=True)]),
                    "cpu": spread([
                        (a.tokens / a.cpu) / (b.tokens / b.cpu)
                        for a, b in zip(runs[mine][work], runs[name][work], strict=True)
                    ]),
                } for work in ("fixed", "natural")
            }  # fmt: skip
    show_comparison(result)
    return result


def references(base: Settings, sets: list[Any], greedy: Job, sampled: Job) -> tuple[list[list[int]], list[list[int]]]:
    """How long our engine's sample of each request is, set by set; transformers' greedy tokens on the second set."""
    plain = base | {"dtype": "float32", "processes": 1, "threads": 1}
    with Contestant(plain | {"side": "ours"}, sys.executable) as ours:
        to_the_end = sampled | {"stop": True, "lengths": [LONGEST] * REQUESTS}
        lengths = [list(map(len, ours.run(to_the_end | {"prompts": prompts}).outputs)) for prompts in sets]
    reference = plain | {"side": "transformers", "experts": "eager", "batch": REQUESTS}
    with Contestant(reference, sys.executable) as theirs:
        return lengths, theirs.run(greedy | {"prompts": sets[1]}).outputs


def natural_batches(
    options: Any, alive: dict[str, Contestant], chosen: dict[str, Settings], job: Job
) -> dict[str, int]:
    """transformers' best batch size where lengths differ: a batch runs as long as its longest row."""
    found = {}
    for name, settings in chosen.items():
        if settings["side"] == "transformers":
            alive[name].run(job | {"lengths": [8] * REQUESTS})
            rates = {
                size: alive[name].run(job | {"batch": size}).rate
                for size in ([256] if options.quick else [256, 128, 64])
            }
            found[name] = max(rates, key=lambda size: rates[size])
            say(f"{name}, natural lengths, tokens/s by batch: " + ", ".join(f"{k}: {v:,.0f}" for k, v in rates.items()))
    return found


def cut(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def graded(model: str, outputs: list[list[int]], problems: list[Any]) -> float:
    """Share of right answers."""
    from transformers import AutoTokenizer

    from evals.grading import grade

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = (tokenizer.decode(tokens, skip_special_tokens=True).split("</think>")[-1] for tokens in outputs)
    verdicts = [grade(text, one["answer"], one["kind"]).verdict for text, one in zip(texts, problems, strict=True)]
    return verdicts.count("correct") / len(verdicts)


def show_comparison(result: Job) -> None:
    for name, one in result["contestants"].items():
        same, answers = one["greedy_as_transformers_float32"], one["own_ends"]["accuracy"]
        say(f"{name}: {describe(one['settings'])}; {same['to_the_end_token']} of {same['of']} greedy as transformers "
            f"in float32; {answers:.1%} right")  # fmt: skip
    for name, works in result["ratios"].items():
        for work, ratio in works.items():
            wall, cpu = ratio["wall"], ratio["cpu"]
            say(f"{name}, {work}: x{wall['median']:.2f} ({wall['min']:.2f} to {wall['max']:.2f}), "
                f"by CPU seconds x{cpu['median']:.2f} ({cpu['min']:.2f} to {cpu['max']:.2f})")  # fmt: skip

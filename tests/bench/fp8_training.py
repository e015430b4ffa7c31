"""FP8 training against bf16 on the same data: how far apart the losses are, beside what another seed makes of it.

    python -m tests.bench.fp8_training prepare tiny.npz --recipe configs/teacher/tiny-r1.yaml --tokens 12250000
    python -m tests.bench.fp8_training run tiny.npz --out runs/fp8 --device cuda [--seeds 3] [--tokens N] [--jobs N]
    python -m tests.bench.fp8_training run --mid --out runs/fp8-mid --device cuda [--minutes 3]

`prepare` writes a recipe's examples as token ids, with its model and training settings, so that `run` needs torch
alone: a machine with a GPU may have nothing else. `run` trains with each seed (weights and order of the examples) in
bf16 and in FP8 with bf16 averages, and compares, FP8 against bf16 of the same seed and bf16 over its seeds:

  train      mean loss of the last fifth of the steps, and of all (how fast it falls)
  held out   loss of the final weights, computed in bf16 on both sides, on 256,000 tokens that no run saw

DeepSeek-V3 (section 3.3) reports less than 0.25%. `--again` adds what the comparison cannot see below: each bf16 run
once more from weights that differ by a millionth. `--separate` adds what FP8 training is made of, each by itself:
`products` in FP8 with float32 averages, and `moments`, bf16 with bf16 averages. `--mid` is a mixture of experts of some
150M parameters on the text of Python's own library and packages, as bytes; its rate falls to zero over the last 30% of
`--tokens`, without which the last steps' noise is larger than what is looked for.

On a CPU each run is a process, `--jobs` at a time. On a GPU, where a small model's kernels leave most of the device
idle, `--jobs` runs share it as streams of one process. What is killed, or stopped after `--minutes`, is compared as
far as it came; what stands finished in `--out` is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.bench.fp8_training_data import HELD_OUT, LibraryText, Stored, prepare

_drawing = threading.Lock()


def train_all(args: argparse.Namespace) -> None:
    """The runs of `--runs`, in this process."""
    import torch

    torch.set_num_threads(args.threads)
    runs = [(kind, int(seed)) for kind, seed in (run.split(":") for run in args.runs.split(","))]
    if args.jobs == 1:
        for kind, seed in runs:
            train_one(args, kind, seed)
    else:
        with ThreadPoolExecutor(args.jobs) as pool:
            for done in [pool.submit(train_one, args, kind, seed) for kind, seed in runs]:
                done.result()


def train_one(args: argparse.Namespace, kind: str, seed: int) -> None:
    import torch

    from teacher import load_model
    from teacher.config import DeepseekV3Config
    from teacher.train import train
    from teacher.train_settings import TrainSettings

    example = LibraryText(seed) if args.mid else Stored(args.data, seed)
    training = {**example.about["training"], "checkpoint_every": 10**6, "eval_every": 0, "log_every": 20}
    training |= {"print_every": 500, "total_tokens": args.tokens}
    training |= {"fp8": kind in ("fp8", "products"), "moments": "bfloat16" if kind in ("fp8", "moments") else "float32"}
    if args.device == "cuda":
        training |= {"micro_tokens": training["tokens_per_step"]}
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    assert training.keys() <= known, training.keys() - known
    with _drawing:  # the generator is the process's
        torch.manual_seed(seed)
        model = load_model(DeepseekV3Config.from_dict(example.about["model"]), dtype=torch.float32)
    if kind == "again":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6)
    out = args.out / f"{kind}-{seed}"
    if training["fp8"] and args.jobs > 1:
        wait_for_others(args)
    with torch.cuda.stream(torch.cuda.Stream()) if args.device == "cuda" else nullcontext():
        model.to(args.device)
        began = time.perf_counter()
        result = train(model, example, TrainSettings(**training), out)
        loss = held_out_loss(model, example, training["seq_len"])
    figures = {"held_out": loss, "tokens": result.tokens, "seconds": time.perf_counter() - began}
    (out / "end.json").write_text(json.dumps(figures) + "\n")
    print(f"{kind}-{seed}: held out {loss:.5f}, {result.steps} steps, {figures['seconds']:.0f} s", flush=True)


def wait_for_others(args: argparse.Namespace) -> None:
    """Until the runs in bf16 are on their way: the first step in FP8 compiles kernels, and nobody records meanwhile."""
    plain = [run for run in args.runs.split(",") if not run.startswith(("fp8", "products"))]
    logs = [args.out / run.replace(":", "-") / "training_log.jsonl" for run in plain]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not all(log.exists() and log.stat().st_size for log in logs):
        time.sleep(0.1)


def held_out_loss(model: Any, example: Any, seq_len: int) -> float:
    """Mean cross entropy of the next token in bf16, over HELD_OUT tokens of whole examples."""
    import torch

    from teacher.balance import LoadBalance
    from teacher.batches import Cursor, step_batches
    from teacher.objective import Objective

    device, rows = model.lm_head.weight.device, max(1, 8192 // seq_len)
    stream = step_batches(example.held_out, Cursor(), rows=rows, micro_rows=rows, seq_len=seq_len, longest=seq_len)
    objective, balance = Objective(0.0, 0.0, True), LoadBalance(model)
    total, seen, counted = 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        while seen < HELD_OUT:
            step = next(stream)
            _, part = objective.loss(model, balance, step.micro[0].to(device), step)
            total += part.figures["loss"].item() * step.losses[0]
            seen, counted = seen + step.tokens, counted + step.losses[0]
    return total / counted


def run(args: argparse.Namespace) -> None:
    """All runs, then the comparison of the steps that all reached."""
    kinds = ["bf16", "fp8"] + (["products", "moments"] if args.separate else []) + (["again"] if args.again else [])
    wanted = [(kind, seed) for seed in range(args.seeds) for kind in kinds]
    if args.jobs > 1:  # those that compile nothing are on their way first
        wanted.sort(key=lambda run: kinds.index(run[0]))
    wanted = [(kind, seed) for kind, seed in wanted if not (args.out / f"{kind}-{seed}" / "end.json").exists()]
    deadline = time.monotonic() + args.minutes * 60
    args.out.mkdir(parents=True, exist_ok=True)
    together = [[one] for one in wanted] if args.device != "cuda" else [wanted] if wanted else []
    running: list[subprocess.Popen[bytes]] = []
    try:
        for runs in together:
            most = 1 if args.device == "cuda" else args.jobs
            while sum(p.poll() is None for p in running) >= most and time.monotonic() < deadline:
                time.sleep(0.2)
            running.append(child(args, runs))
        while any(p.poll() is None for p in running) and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
            process.wait()
        compare(args, kinds)


def child(args: argparse.Namespace, runs: list[tuple[str, int]]) -> subprocess.Popen[bytes]:
    data = ["--mid"] if args.mid else [str(args.data)]
    named = ",".join(f"{kind}:{seed}" for kind, seed in runs)
    jobs = args.jobs if args.device == "cuda" else 1
    command = [sys.executable, "-m", "tests.bench.fp8_training", "run", *data, "--runs", named, "--out", str(args.out),
               "--tokens", str(args.tokens), "--device", args.device, "--threads", str(args.threads), "--jobs",
               str(jobs)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    name = "all" if len(runs) > 1 else named.replace(":", "-")
    with open(args.out / f"{name}.txt", "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def compare(args: argparse.Namespace, kinds: list[str]) -> None:
    """Print and write what the finished steps say."""
    curves = {}
    for kind in kinds:
        for seed in range(args.seeds):
            path = args.out / f"{kind}-{seed}" / "training_log.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            if any(not math.isfinite(row["loss"]) for row in rows):
                print(f"{kind}-{seed} has lost its way: see {path}")
            elif len(rows) >= 20:
                curves[kind, seed] = rows
    seeds = [seed for seed in range(args.seeds) if all((kind, seed) in curves for kind in kinds)]
    if not seeds:
        print("no seed has 20 steps of every kind yet")
        return
    steps = min(len(curves[kind, seed]) for kind in kinds for seed in seeds)
    tail = slice(steps - max(1, steps // 5), steps)
    figures: dict[str, Any] = {"steps": steps, "tokens": curves["bf16", seeds[0]][steps - 1]["tokens"]}
    figures |= {"device": device(args.device), "mid": args.mid, "seeds": seeds, "jobs": args.jobs}
    print(f"{steps} steps, {figures['tokens']:,} tokens, {figures['device']}")
    ends = {key: statistics.fmean(row["loss"] for row in rows[tail]) for key, rows in curves.items()}
    figures["train"] = pairs("train, last fifth", ends, kinds, seeds)
    means = {key: statistics.fmean(row["loss"] for row in rows[:steps]) for key, rows in curves.items()}
    figures["train_all"] = pairs("train, all steps", means, kinds, seeds)
    held = {(k, s): json.loads(path.read_text())["held_out"]
            for k in kinds for s in seeds if (path := args.out / f"{k}-{s}" / "end.json").exists()}  # fmt: skip
    whole = [seed for seed in seeds if all((kind, seed) in held for kind in kinds)]
    if whole:
        figures["held_out"] = pairs("held out", held, kinds, whole)
    figures["tokens_per_second"] = {
        kind: statistics.median(row["tokens_per_second"] for seed in seeds for row in curves[kind, seed][20:steps])
        for kind in kinds
        if steps > 20
    }
    beside = f" of a run beside {args.jobs - 1} others" if args.jobs > 1 else ""
    print(
        f"tokens a second{beside}, median: "
        + ", ".join(f"{k} {v:,.0f}" for k, v in figures["tokens_per_second"].items())
    )
    every = max(1, steps // 300)
    figures["curves"] = {
        f"{kind}-{seed}": [
            [rows[end - 1]["tokens"], round(statistics.fmean(r["loss"] for r in rows[end - every : end]), 5)]
            for end in range(every, steps + 1, every)
        ]
        for (kind, seed), rows in curves.items()
        if seed in seeds
    }
    (args.out / "comparison.json").write_text(json.dumps(figures) + "\n")


def pairs(name: str, loss: dict[tuple[str, int], float], kinds: list[str], seeds: list[int]) -> dict[str, Any]:
    """Each kind against bf16, seed by seed; the mean with its standard error; bf16 over its seeds."""
    plain = [loss["bf16", seed] for seed in seeds]
    mean = statistics.fmean(plain)
    found: dict[str, Any] = {"bf16": plain}
    for seed in seeds:
        print(f"  {name}, seed {seed}: " + "  ".join(f"{kind} {loss[kind, seed]:.5f}" for kind in kinds))
    for kind in kinds[1:]:
        ratio = [loss[kind, seed] / loss["bf16", seed] - 1 for seed in seeds]
        error = statistics.stdev(ratio) / len(ratio) ** 0.5 if len(ratio) > 1 else float("nan")
        found[kind] = {"loss": [loss[kind, s] for s in seeds], "pairs": ratio, "mean": statistics.fmean(ratio)}
        found[kind]["standard_error"] = error if len(ratio) > 1 else None
        print(f"  {name}: {kind} against bf16 {statistics.fmean(ratio):+.3%}, standard error {error:.3%}; pairs "
              + ", ".join(f"{one:+.3%}" for one in ratio))  # fmt: skip
    found["bf16_spread"] = (max(plain) - min(plain)) / mean
    found["bf16_deviation"] = statistics.stdev(plain) / mean if len(plain) > 1 else None
    print(f"  {name}: bf16 over seeds, lowest to highest {found['bf16_spread']:.3%}", end="")
    print("" if len(plain) < 2 else f", standard deviation {found['bf16_deviation']:.3%}")
    return found


def device(kind: str) -> str:
    if kind != "cuda":
        return "CPU"
    import torch

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description="See the module's text.")
    parser.add_argument("what", choices=["prepare", "run"])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--recipe", default="configs/teacher/tiny-r1.yaml")
    parser.add_argument("--tokens", type=int, default=12_000_000)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8-training"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="bf16 once more, from weights a millionth off")
    parser.add_argument("--separate", action="store_true", help="FP8's products and bf16's averages by themselves too")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=1e6, help="all runs are stopped then, and compared so far")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mid", action="store_true")
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "prepare":
        prepare(args.data, args.recipe, args.tokens)
    elif args.runs:
        train_all(args)
    else:
        run(args)


if __name__ == "__main__":
    main()

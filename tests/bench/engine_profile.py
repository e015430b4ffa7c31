"""Which kernels a decoding step of the engine is made of: torch's profiler over steps of V2-Lite's shape or tiny-r1's.

    python -m tests.bench.engine_profile [--sequences 1,64] [--weights fp8|experts|model] [--top 25] [--speculate 1]
    python -m tests.bench.engine_profile --tiny --sequences 1 --speculate 4

A table for each concurrency: microseconds and launches a step by kernel, and beside the profiler, without it, what a
step takes by the clock, and what of it passes while the host copies words to the device, starts the recording and waits
for what comes back (teacher/rounds.py). With --speculate a step is a round: drafts verified, and drafted again.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import teacher.rounds
import teacher.runner
from teacher import load_model
from teacher.engine import Engine
from teacher.model import DeepseekV3
from tests.bench.engine_gpu import lite, quantized, requests

STEPS = 8


class Clock:
    """Wraps what the host does for a recording, and adds up the seconds of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        for name, owner in (("send", teacher.rounds._Words), ("fetch", teacher.rounds._Words),
                            ("replay", torch.cuda.CUDAGraph), ("tell", teacher.rounds._Recording)):  # fmt: skip
            setattr(owner, name, self._timed(name, getattr(owner, name)))

    def _timed(self, name: str, work: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            found = work(*arguments)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return found

        return timed


def table(model: DeepseekV3, count: int, top: int, cache_dtype: str, speculate: int, clock: Clock) -> None:
    """Print the kernels of a step of `count` sequences."""
    engine = Engine(
        model, None, count, 512, cache_tokens=count * 512, cache_dtype=cache_dtype, speculate=speculate,  # type: ignore[arg-type]
        speculate_rows=count,
    )  # fmt: skip
    for request in requests(count, 400, 380, None):
        engine.add(request)
    for _ in range(20):
        engine.step()
    torch.cuda.synchronize()
    clock.seconds.clear()
    started = time.perf_counter()
    for _ in range(2 * STEPS):
        engine.step()
    torch.cuda.synchronize()
    step = (time.perf_counter() - started) / 2 / STEPS
    told = ", ".join(f"{name} {seconds / 2 / STEPS * 1e6:.0f}" for name, seconds in clock.seconds.items())
    print(f"\n{engine.runs_in}; the host, us a step: {told}, all {step * 1e6:.0f}")
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
    kernels: dict[str, tuple[float, int]] = {}
    for event in found.events():
        if event.device_time > 0:
            name = re.sub(r"\s+", " ", event.name)[:110]
            seconds, launches = kernels.get(name, (0.0, 0))
            kernels[name] = seconds + event.device_time, launches + 1
    total, launches = (sum(each[i] for each in kernels.values()) / STEPS for i in (0, 1))
    print(f"{count} sequences: {step * 1e3:.2f} ms a step, kernels {total / 1e3:.2f} ms in {launches:.0f} launches")
    for name, (us, times) in sorted(kernels.items(), key=lambda item: -item[1][0])[:top]:
        print(f"{us / STEPS:9.1f} us {times / STEPS:6.1f} x {us / times:8.2f}  {name}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sequences", default="1,64")
    options.add_argument("--weights", choices=("fp8", "experts", "model"), default="model")
    options.add_argument("--cache", choices=("model", "fp8"), default="model")
    options.add_argument("--top", type=int, default=25)
    options.add_argument("--speculate", type=int, default=0, help="drafts a step")
    options.add_argument("--tiny", action="store_true", help="tiny-r1, in bf16")
    options.add_argument("--plain", action="store_true", help="without the fused kernels of teacher.fused")
    chosen = options.parse_args()
    if chosen.plain:
        teacher.runner.fused_obstacle = lambda model: "switched off"
    if chosen.tiny:
        model = load_model("teacher/models/tiny-r1", dtype="bfloat16", device="cuda")
    else:
        model = quantized(lite(), chosen.weights)
    clock = Clock()
    for count in map(int, chosen.sequences.split(",")):
        table(model, count, chosen.top, chosen.cache, chosen.speculate, clock)


if __name__ == "__main__":
    main()

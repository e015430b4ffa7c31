"""Where a training step's time on the GPU goes: kernels by kind, from torch's profiler."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

# The first that fits. Names are cuBLAS's, flash attention's, cuDNN's, inductor's (triton_…) and torch's own.
KINDS = {
    "attention backward": ("flash_bwd", "sdpa_sm90_flash_bprop", "bprop", "dot_do_o", "convert_dq", "convert_dkv"),
    "attention forward": ("flash_fwd", "fprop", "fmha"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitKreduce"),
    "loss": ("softmax", "nll", "_kernel", "SoftMax"),
    "optimizer, clipping": ("adam", "multi_tensor", "lpnorm", "LpNorm"),
    "compiled elementwise": ("triton_",),
    "embedding, indexing": ("embedding", "index", "sort", "Sort", "scan", "Scan", "gather", "scatter", "krn_partial"),
    "copies, casts": ("copy", "Memcpy", "Memset", "fill", "Fill"),
    "elementwise": ("elementwise", "reduce", "Cat"),
}


def kind_of(name: str) -> str:
    if name == "_kernel":
        return "loss"
    for kind, parts in KINDS.items():
        if any(part in name for part in parts if part != "_kernel"):
            return kind
    return "other"


class StepProfile:
    """start() and stop() around whole steps; table() says what ran between."""

    def start(self) -> None:
        torch.cuda.synchronize()
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profiler.start()
        self.began = time.perf_counter()

    def stop(self) -> None:
        torch.cuda.synchronize()
        self.wall = time.perf_counter() - self.began
        self.profiler.stop()

    def table(self, top: int = 25) -> str:
        kernels: list[Any] = [e for e in self.profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in kernels)
        busy, until, last = 0.0, float("-inf"), ""
        gaps: list[tuple[float, str, str]] = []
        for start, end, name in spans:
            busy += max(0.0, end - max(start, until))
            if last and start > until:
                gaps.append((start - until, last, name))
            if end > until:
                until, last = end, name
        time_of: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in kernels:
            time_of[event.name] += event.time_range.end - event.time_range.start
            calls[event.name] += 1
        kinds: Counter[str] = Counter()
        for name, spent in time_of.items():
            kinds[kind_of(name)] += spent
        lines = [f"wall {self.wall * 1e3:.1f} ms, GPU busy {busy / 1e3:.1f} ms in {len(kernels)} kernels"]
        lines += [f"  {spent / 1e3:8.2f} ms  {kind}" for kind, spent in kinds.most_common()]
        lines += [
            f"    {spent / 1e3:8.2f} ms {calls[name]:5} x  {kind_of(name)[:12]:<12}  {name[:110]}"
            for name, spent in time_of.most_common(top)
        ]
        lines += [
            f"    {gap / 1e3:8.2f} ms idle between {before[:60]} and {after[:60]}"
            for gap, before, after in sorted(gaps)[::-1][:8]
        ]
        return "\n".join(lines)

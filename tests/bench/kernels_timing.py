"""Timing on a GPU with the L2 flushed and fresh tensors, the machine's two ceilings, and what a row of the table holds.

A kernel's module offers `checks(bench)` and `rows(bench)` (see kernels_experts.py and kernels_mla.py): the first yields
Check, the second Row, by calling `bench.measure`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

FP8_PEAK = 1979e12  # dense, by the H100/H200 SXM datasheet: a lead, not a reading
_FLUSH_BYTES = 256 * 2**20  # several times the L2 of any Hopper part


@dataclass(frozen=True)
class Check:
    """One comparison with a reference. `passed` is error <= bound; NaN never passes."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Row:
    """One measurement. `flops` and `bytes` are the floors: the work that any version must do."""

    kernel: str  # "grouped gemm", "expert layer decode", "mla decode", "quantise", ...
    shape: str  # for people
    by: str  # "ours" or the peer's name
    flops: float
    bytes: float
    seconds: float  # median
    low: float  # quartiles of the repetitions
    high: float
    note: str = ""  # a peer that refused says why here, with seconds = nan

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12

    @property
    def terabytes(self) -> float:
        return self.bytes / self.seconds / 1e12

    def as_dict(self) -> dict[str, Any]:
        found = {**asdict(self), "tflops": round(self.tflops, 1), "tb_per_s": round(self.terabytes, 3)}
        return {key: None if value != value else value for key, value in found.items()}  # JSON knows no NaN


class Bench:
    """What the kernels' modules are given: how to time, and how long the run may be."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.repeats = 10 if quick else 30
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def measure(
        self, kernel: str, shape: str, by: str, flops: float, bytes: float, makes: list[Callable[[], Any]]
    ) -> Row:
        """Time `makes`: closures that do the same work on different tensors, taken in turn.

        Each is recorded as a CUDA graph, so that the host's time between launches is not measured; one that cannot be
        recorded (it asks the device for a size) is launched plainly, and its row says so. A peer that raises gives a
        row of NaN with the reason.
        """
        try:
            seconds, note = self._seconds(makes)
        except Exception as error:  # whatever a peer raises is its answer
            torch.cuda.synchronize()
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            return Row(kernel, shape, by, flops, bytes, float("nan"), float("nan"), float("nan"), reason)
        low, median, high = statistics.quantiles(seconds, n=4)
        return Row(kernel, shape, by, flops, bytes, median, low, high, note)

    def _seconds(self, makes: list[Callable[[], Any]]) -> tuple[list[float], str]:
        for make in makes:
            for _ in range(2):
                make()
        torch.cuda.synchronize()
        runs, note, pool = list(makes), "", None
        try:
            graphs = []
            for make in makes:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    make()
                pool = graph.pool()
                graphs.append(graph.replay)
            runs = graphs
        except RuntimeError:
            torch.cuda.synchronize()
            note = "no graph"
        events = []
        for run in itertools.islice(itertools.cycle(runs), self.repeats + 2):
            self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events[2:]], note


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run, in the same way: what the rows are held against."""

    copy_bytes: float  # bytes a second, read plus written, of a device-to-device copy
    bf16_flops: float  # FLOP a second of an 8192-cubed bf16 product, random data

    @classmethod
    def measured(cls, bench: Bench) -> Ceilings:
        source = torch.randn(2**29, device="cuda")
        target = torch.empty_like(source)
        # By a kernel: copy_ in a graph is the copy engine's, which is a third slower.
        copy = bench.measure(
            "ceiling", "copy 2 GiB", "torch.neg", 0, 2 * source.nbytes, [lambda: torch.neg(source, out=target)]
        )
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        product = bench.measure("ceiling", "bf16 8192^3", "torch", 2 * 8192**3, 0, [lambda: a @ b])
        return cls(copy.bytes / copy.seconds, product.flops / product.seconds)

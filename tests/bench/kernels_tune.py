"""Measure the tiles of the grouped products on this GPU, and write the best for each shape to a file.

    python -m tests.bench.kernels_tune --out DIR [--all DIR/all.json] [--only gemm|swiglu] [--commit X] [--few]

DIR: teacher/kernels/configs (shipped), what DISTILL_KERNEL_CONFIGS names, or the user cache. Shapes are R1's:
gate and up (N 2 x 2048, K 7168; also as a plain product of N 4096) and down (N 7168, K 2048), for the rows an expert
gets at decode (256 experts, 1 to 4096 tokens) and in prefill.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from teacher.kernels.grouped_gemm import grouped_gemm, grouped_swiglu
from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.tuning import Tile, save
from tests.bench.kernels import about
from tests.bench.kernels_operands import EXPERTS, HIDDEN, INNER, TOP_K, contiguous, routing, rows, stack
from tests.bench.kernels_timing import Bench, Row

# Kind, N and K; a SwiGLU's matrices have 2 N rows.
PRODUCTS = (("swiglu", INNER, HIDDEN), ("gemm", HIDDEN, INNER), ("gemm", 2 * INNER, HIDDEN))
# Rows an expert up to which a measurement holds, and how it is made: so many tokens routed over 256 experts, or so many
# rows for each of 8.
DECODE = (
    (0.05, 1),
    (0.5, 8),
    (2.0, 32),
    (4.0, 128),
    (8.0, 256),
    (16.0, 512),
    (32.0, 1024),
    (64.0, 2048),
    (128.0, 4096),
)
PREFILL = ((512.0, 512), (1e9, 4096))


def candidates(kind: str, average: float) -> Iterator[Tile]:
    """Tiles worth trying for so many rows an expert."""
    pair = 2 if kind == "swiglu" else 1
    if average <= 64:
        for least in (16, 32, 64):
            if average / 2 <= least <= max(16, 8 * average):
                for resident, stages in ((2, 4), (2, 3)):
                    if least * 128 + pair * 128 * 128 <= 220_000 // (stages * resident):
                        yield Tile(least, 128, pair, True, 64, resident, 4, stages)
        if kind == "gemm" and average <= 16:
            yield Tile(16, 64, 1, True, 64, 4, 4, 4)
            yield Tile(32, 64, 1, True, 64, 4, 4, 4)
    if average > 8:
        yield Tile(64, 128, pair, False, 64, 1, 4, 5 if pair == 1 else 4)
        if kind == "gemm":
            yield Tile(64, 128, 1, False, 16, 3, 4, 3)
    if average > 32:
        for group in (8, 16):
            yield Tile(128, 128, 2, group=group, stages=4, specialize=True)
    if average > 256:
        yield Tile(128, 128, 2, group=8, stages=4)


def measure(bench: Bench, kind: str, n: int, k: int, x: Fp8, w: Fp8, groups: Groups, tile: Tile, label: str) -> Row:
    def run() -> None:
        if kind == "swiglu":
            grouped_swiglu(x, w, groups, tile=tile)
        else:
            grouped_gemm(x, w, groups, tile=tile)

    count, touched = len(x.values), int((groups.count_E > 0).sum())
    wide = 2 * n if kind == "swiglu" else n
    moved = touched * wide * k + count * (k + (n if kind == "swiglu" else 2 * n))
    return bench.measure(f"{kind} {n} {k}", label, str(tile), 2 * count * wide * k, moved, [run])


def main() -> None:
    options = argparse.ArgumentParser(prog="tests.bench.kernels_tune", description=__doc__)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--all", type=Path, help="every measurement, not the best alone")
    options.add_argument("--only", choices=("gemm", "swiglu"))
    options.add_argument("--commit", help="name of the code under test, where git does not know it")
    options.add_argument("--few", action="store_true", help="the first of each list alone: a rehearsal")
    chosen = options.parse_args()
    bench, best, every = Bench(quick=True), {}, []
    for kind, n, k in PRODUCTS:
        if chosen.only not in (None, kind):
            continue
        w = stack(EXPERTS, 2 * n if kind == "swiglu" else n, k)
        tiles: list[tuple[float, Tile]] = []
        for up_to, size in (DECODE + PREFILL)[: 1 if chosen.few else None]:
            if up_to <= 128:
                indices, _ = routing(size)
                groups, total = contiguous(indices.flatten().bincount(minlength=EXPERTS).tolist()), size * TOP_K
                experts, label = w, f"{size} tokens"
            else:
                experts = Fp8(w.values[:8], w.scales[:8])
                groups, total, label = contiguous([size] * 8), 8 * size, f"8 x {size}"
            x, found = rows(total, k), []
            for tile in candidates(kind, up_to):
                row = measure(bench, kind, n, k, x, experts, groups, tile, label)
                found.append((row.seconds, tile))
                every.append(row.as_dict())
                print(f"{row.kernel:<18} {label:<12} {row.seconds * 1e6:9.1f} us {row.tflops:7.1f} TFLOP/s "
                      f"{row.terabytes:6.3f} TB/s {tile} {row.note}", flush=True)  # fmt: skip
                if chosen.all:
                    chosen.all.write_text(
                        json.dumps({"about": about(chosen.commit, "tests.bench.kernels_tune"), "rows": every}, indent=1)
                        + "\n"
                    )
            found = [each for each in found if each[0] == each[0]]
            if found:
                tiles.append((up_to, min(found, key=lambda each: each[0])[1]))
        best[f"{kind} {n} {k}"] = tiles
        del w
    name = torch.cuda.get_device_name().replace(" ", "_")
    save(chosen.out / f"{name}.json", best, about(chosen.commit, "tests.bench.kernels_tune"))


if __name__ == "__main__":
    main()

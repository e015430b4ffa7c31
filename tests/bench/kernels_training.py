"""The products of FP8 training that inference has not: the gradients of weights, and a layer's three products in turn.

python -m tests.bench.kernels_training
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from teacher.fp8_products import Quantized
from teacher.kernels import products
from tests.bench.kernels_timing import Bench, Row

# Rows each expert has, experts, O, K: a mixture of some 150M parameters, R1's layers, dense projections.
EXPERTS = ((4096, 32, 768, 512), (4096, 32, 512, 384), (4096, 8, 4096, 7168), (4096, 8, 7168, 2048))
DENSE = ((32768, 1536, 512), (32768, 256, 512), (32768, 160, 512), (32768, 1024, 128), (32768, 7168, 1536))


def along_tokens(rows: int, columns: int) -> Quantized:
    return products.along_tokens(torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16))


def show(row: Row) -> None:
    spread = f"{row.low * 1e6:.1f} to {row.high * 1e6:.1f}"
    print(
        f"{row.kernel:24} {row.shape:34} {row.by:6} {row.seconds * 1e6:9.1f} µs ({spread}) {row.tflops:7.1f} TFLOP/s "
        f"{row.terabytes:5.2f} TB/s {row.note}",
        flush=True,
    )


def layer(x_NK: Tensor, w_OK: Tensor, dy_NO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `teacher.fp8_training` does it: casts and products of a linear layer, forward and backward."""
    x, (w, turned) = products.along_columns(x_NK), products.weight_both(w_OK)
    y = products.product(x, w, torch.bfloat16)
    across, along = products.both_ways(dy_NO)
    dx = products.product(across, turned, torch.bfloat16)
    return y, dx, products.weight_product(along, products.again_along_tokens(x))


def layer_bf16(x_NK: Tensor, w_OK: Tensor, dy_NO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w = w_OK.bfloat16()
    return x_NK @ w.t(), dy_NO @ w, (dy_NO.t() @ x_NK).float()


def main() -> None:
    bench = Bench(quick=False)
    for each, experts, o, k in EXPERTS:
        rows = each * experts
        sets = [(along_tokens(rows, o), along_tokens(rows, k)) for _ in range(2)]
        ends = torch.arange(each, rows + 1, each, dtype=torch.int32, device="cuda")
        runs = [lambda dy=dy, x=x, ends=ends: products.grouped_weight_product(dy, x, ends) for dy, x in sets]
        flops, moved = 2 * rows * o * k, rows * (o + k) + 4 * experts * o * k
        show(bench.measure("weight gradient, experts", f"{experts} x {each}, {o} x {k}", "ours", flops, moved, runs))
    for (rows, o, k), by in itertools.product(DENSE, ("ours", "bf16")):
        x, dy = (torch.randn(rows, size, device="cuda", dtype=torch.bfloat16) for size in (k, o))
        w = torch.randn(o, k, device="cuda")
        make = layer if by == "ours" else layer_bf16
        runs = [lambda make=make, x=x, w=w, dy=dy: make(x, w, dy)]
        show(bench.measure("linear, all three", f"{rows}, {o} x {k}", by, 6 * rows * o * k, 0, runs))


if __name__ == "__main__":
    main()

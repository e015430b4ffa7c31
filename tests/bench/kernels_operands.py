"""Operands for the expert kernels at R1's sizes: fresh random values, quantised on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.quantize import quantize_activations, quantize_weights

HIDDEN, INNER, EXPERTS, TOP_K = 7168, 2048, 256, 8


def stack(experts: int, n: int, k: int) -> Fp8:
    """Matrices of normal values. Of many experts eight are drawn and repeated, each at a place of its own."""
    drawn = min(experts, 8)
    values, scales = quantize_weights(torch.randn(drawn, n, k, device="cuda", dtype=torch.bfloat16) / k**0.5)
    times = -(-experts // drawn)
    return Fp8(values.repeat(times, 1, 1)[:experts].contiguous(), scales.repeat(times, 1, 1)[:experts].contiguous())


def rows(count: int, k: int) -> Fp8:
    return Fp8(*quantize_activations(torch.randn(count, k, device="cuda", dtype=torch.bfloat16)))


def contiguous(counts: list[int]) -> Groups:
    starts = [sum(counts[:e]) for e in range(len(counts))]
    return Groups(*(torch.tensor(each, dtype=torch.int32, device="cuda") for each in (starts, counts)))


def routing(tokens: int, experts: int = EXPERTS, k: int = TOP_K) -> tuple[Tensor, Tensor]:
    """Uniform routing: each token's experts different."""
    indices = torch.rand(tokens, experts, device="cuda").argsort(1)[:, :k].contiguous()
    weights = torch.rand(tokens, k, device="cuda") + 0.1
    return indices, weights / weights.sum(1, keepdim=True)


def visited(indices_NK: Tensor) -> int:
    return len(indices_NK.unique())

"""Operands for the grouped products, and how results are held against references."""

import torch

from teacher.fp8 import quantize
from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.quantize import quantize_activations


def operands(counts, n, k, device, starts=None, rows=None):
    """Fresh rows and matrices, quantised; where `starts` leaves gaps, the rows there are NaN."""
    if starts is None:
        starts = [sum(counts[:e]) for e in range(len(counts))]
    rows = rows or sum(counts)
    x = torch.full((rows, k), float("nan"), device=device)
    for start, count in zip(starts, counts, strict=True):
        x[start : start + count] = torch.randn(count, k, device=device)
    w = torch.randn(len(counts), n, k, device=device) / k**0.5
    groups = Groups(*(torch.tensor(each, dtype=torch.int32, device=device) for each in (starts, counts)))
    return x, w, groups


def quantized(x, w, halves=1):
    """The operands in FP8; each of `halves` of a matrix has blocks of its own."""
    parts = [[quantize(half) for half in matrix.chunk(halves)] for matrix in w]
    values = torch.stack([torch.cat([part[0] for part in each]) for each in parts])
    scales = torch.stack([torch.cat([part[1] for part in each]) for each in parts])
    return Fp8(*quantize_activations(x)), Fp8(values, scales)


def member_rows(groups):
    return torch.cat(
        [torch.arange(s, s + c) for s, c in zip(groups.start_E.tolist(), groups.count_E.tolist(), strict=True)]
    )


def relative(found, expected):
    """mean|found - expected| / mean|expected|; a reference of zeros is refused."""
    found, expected = found.float(), expected.float()
    assert expected.abs().mean() > 0, "a reference of zeros proves nothing"
    return float((found - expected).abs().mean() / expected.abs().mean())


def deepgemm_difference(found, expected):
    """DeepGEMM's measure: 1 - 2 sum(xy) / sum(x^2 + y^2)."""
    x, y = found.double(), expected.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())

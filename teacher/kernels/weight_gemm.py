"""The gradient of expert weights in FP8: dy^T x within each expert's rows, tiles of 128 tokens, fp32 sums.

The third product of FP8 training (DeepSeek-V3 section 3.3.1, "Wgrad"): it sums over tokens, so both operands come
transposed, in tiles of 1 x 128 along the tokens (`quantize_activations_transposed`), and each has a scale for every row
and every 128 tokens. An expert's rows begin at a multiple of 128, so that no tile holds two experts. A dense layer is
one expert with all rows, or several with a part each, whose results are then added.

Whole tiles arrive by TMA; what an expert has beyond its last whole tile is cut off in registers. Measured on an H200:
64 x 128 by four warps, two programs a multiprocessor, before 128 x 128 by eight, tiles in two halves, and a kernel in
Gluon with a warp of its own that loads, as `grouped_gemm_hopper` has one (docs/kernels.md).

Floors, for R rows in all and O x K matrices: 2 R O K FLOP; bytes R (O + K) of values + 4 E O K of fp32 result (and a
32nd of the values in scales). The result is what moves: from 2 x 128 rows an expert on the arithmetic takes longer.

Shapes: R rows (tokens), E experts, O and K columns of the layer's output and input; r in tiles of 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from teacher.fp8 import ACTIVATION_BLOCK, FP8, dequantize
from teacher.kernels.arguments import same_device, take
from teacher.kernels.operands import Fp8, Groups


class WeightTile(NamedTuple):
    """How a gradient is cut up."""

    rows: int = 64  # of O
    columns: int = 128  # of K
    warps: int = 4
    stages: int = 3
    group: int = 8


@triton.jit
def _only(values, real):
    """Zeros in place of what is not real, NaN included."""
    return tl.where(real, values.to(tl.uint8, bitcast=True), 0).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _weight_kernel(
    dy, x, dy_rows, x_rows, dy_stride, x_stride, dy_scales, x_scales, dy_scale_O, dy_scale_r, x_scale_K, x_scale_r, out,
    start_E, count_E, outputs, inputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One tile (ROWS of O) x (COLUMNS of K) of one expert's gradient."""
    BLOCK: tl.constexpr = 128
    down, across = tl.cdiv(outputs, ROWS), tl.cdiv(inputs, COLUMNS)
    expert, tile = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tile - first * across
    o_first = (first + within % height) * ROWS
    k_first = within // height * COLUMNS
    start, count = tl.load(start_E + expert), tl.load(count_E + expert)
    o, k = o_first + tl.arange(0, ROWS), k_first + tl.arange(0, COLUMNS)
    o_real, k_real = o < outputs, k < inputs
    dy_scale_at = dy_scales + o.to(tl.int64) * dy_scale_O + start // BLOCK * dy_scale_r
    x_scale_at = x_scales + k.to(tl.int64) * x_scale_K + start // BLOCK * x_scale_r
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    whole = 0
    if TMA:
        whole = count // BLOCK * BLOCK
        # Scales are loaded a block ahead: the pipeliner does so for operands alone.
        some = tl.minimum(whole, 1)
        a_next = tl.load(dy_scale_at, mask=o < outputs * some, other=0.0)
        b_next = tl.load(x_scale_at, mask=k < inputs * some, other=0.0)
        for done in tl.range(0, whole, BLOCK):
            a_scale, b_scale = a_next, b_next
            ahead = tl.minimum(done + BLOCK, whole - BLOCK) // BLOCK
            a_next = tl.load(dy_scale_at + ahead * dy_scale_r, mask=o_real, other=0.0)
            b_next = tl.load(x_scale_at + ahead * x_scale_r, mask=k_real, other=0.0)
            a = dy_rows.load([o_first, start + done])
            b = x_rows.load([k_first, start + done])
            total += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
    token = tl.arange(0, BLOCK)
    dy_at = dy + o.to(tl.int64)[:, None] * dy_stride + (start + token)[None, :]
    x_at = x + k.to(tl.int64)[:, None] * x_stride + (start + token)[None, :]
    # What is left: tokens up to the last one, since what comes after it is not the expert's and may be anything.
    for done in tl.range(whole, count, BLOCK, num_stages=1):
        real = (done + token < count)[None, :]
        a_scale = tl.load(dy_scale_at + done // BLOCK * dy_scale_r, mask=o_real, other=0.0)
        b_scale = tl.load(x_scale_at + done // BLOCK * x_scale_r, mask=k_real, other=0.0)
        if TMA:
            a = _only(dy_rows.load([o_first, start + done]), real)
            b = _only(x_rows.load([k_first, start + done]), real)
        else:
            a = tl.load(dy_at + done, mask=o_real[:, None] & real, other=0.0)
            b = tl.load(x_at + done, mask=k_real[:, None] & real, other=0.0)
        total += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
    place = out + expert.to(tl.int64) * outputs * inputs + o.to(tl.int64)[:, None] * inputs + k[None, :]
    tl.store(place, total, mask=o_real[:, None] & k_real[None, :])


def grouped_weight_gemm(dy: Fp8, x: Fp8, groups: Groups, whole: bool = False, tile: WeightTile | None = None) -> Tensor:
    """dy^T x of each expert's rows, (E, O, K) fp32; an expert without rows gets zeros.

    dy (O, R) with scales (O, r) and x (K, R) with (K, r). `groups` starts at multiples of 128, which is not checked:
    it would wait for the device.
    """
    for name, operand in (("dy", dy), ("x", x)):
        take(f"{name}.values", operand.values, (FP8,), (2,))
        wanted = [operand.values.shape[0], -(-operand.values.shape[1] // 128)]
        if operand.scales.dtype != torch.float32 or list(operand.scales.shape) != wanted:
            found = f"{operand.scales.dtype} of shape {list(operand.scales.shape)}"
            raise ValueError(f"{name}.scales is {found}; taken: float32 of shape {wanted}")
    if dy.values.shape[1] != x.values.shape[1]:
        raise ValueError(f"dy.values has {dy.values.shape[1]} tokens, x.values {x.values.shape[1]}; taken: the same")
    take("start_E", groups.start_E, (torch.int32,), (1,), contiguous=True)
    take("count_E", groups.count_E, (torch.int32,), (1,), contiguous=True)
    same_device(dy=dy.values, x=x.values, start_E=groups.start_E, count_E=groups.count_E)
    (o, rows), k, experts = dy.values.shape, x.values.shape[0], len(groups.start_E)
    out_EOK = torch.empty(experts, o, k, dtype=torch.float32, device=dy.values.device)
    if out_EOK.numel() and rows:
        tile = tile or WeightTile()
        # TMA wants rows that begin at multiples of 16 bytes.
        tma = all(t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (dy.values, x.values))
        by_tma = (
            TensorDescriptor.from_tensor(t, [size, 128]) if tma else None
            for t, size in ((dy.values, tile.rows), (x.values, tile.columns))
        )
        _weight_kernel[(experts * -(-o // tile.rows) * -(-k // tile.columns),)](
            dy.values, x.values, *by_tma, dy.values.stride(0), x.values.stride(0), dy.scales, x.scales,
            *dy.scales.stride(), *x.scales.stride(), out_EOK, groups.start_E, groups.count_E, o, k, ROWS=tile.rows,
            COLUMNS=tile.columns, GROUP=tile.group, TMA=tma, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out_EOK
    return out_EOK.zero_()


def grouped_weight_gemm_reference(dy: Fp8, x: Fp8, groups: Groups) -> Tensor:
    """The definition: everything dequantised, fp32 products, one expert at a time."""
    dy_OR, x_KR = (dequantize(v, s.contiguous(), torch.float32, ACTIVATION_BLOCK) for v, s in (dy, x))
    ranges = zip(groups.start_E.tolist(), groups.count_E.tolist(), strict=True)
    return torch.stack([dy_OR[:, s : s + n] @ x_KR[:, s : s + n].T for s, n in ranges])

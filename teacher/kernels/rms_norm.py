"""Residual addition and RMSNorm in one launch, and on the way the parts of a split product, and rounding to FP8.

What a layer does between two products: x + the product's parts, rounded to bf16 as the residual stream is; its norm;
and the norm's values in tiles of 1 x 128 of FP8 where a product in FP8 reads them next. Floor, N rows of H: 2 N H bytes
in, 4 S N H for the parts, 4 N H out and N H in FP8; one launch instead of five.

Shapes: N rows, H hidden, S parts; h in blocks of 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from teacher.fp8 import ACTIVATION_BLOCK, FP8, quantize
from teacher.kernels.arguments import INTERPRETED, same_device, take
from teacher.kernels.operands import Fp8
from teacher.kernels.quantize import block_scale, encode, magnitude


class Normed(NamedTuple):
    """What `add_rms_norm` gives."""

    sum_NH: Tensor  # x + parts, bf16
    normed_NH: Tensor  # bf16
    in_fp8: Fp8 | None


def empty_fp8(rows: int, columns: int, device: torch.device) -> Fp8:
    """Room for rows in tiles of 1 x 128, scales column by column as the products read them."""
    scales = torch.empty(-(-columns // 128), -(-rows // 4) * 4, dtype=torch.float32, device=device)
    return Fp8(torch.empty(rows, columns, dtype=FP8, device=device), scales[:, :rows].t())


@triton.jit
def to_bf16(x, INTERPRETED: tl.constexpr):
    """fp32 to bf16, nearest even; the interpreter's own cast cuts off."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def store_fp8(values_TB, live_TB, tile_T, row, columns, codes, scales, scale_stride, INTERPRETED: tl.constexpr):
    """A row in tiles (T, 128), already rounded to bf16, as codes and scales."""
    scale_T = block_scale(tl.max(magnitude(values_TB), axis=1), False)
    at_TB = row.to(tl.int64) * columns + tile_T[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(codes + at_TB, encode(values_TB, scale_T[:, None], INTERPRETED), mask=live_TB)
    tl.store(scales + tile_T.to(tl.int64) * scale_stride + row, scale_T, mask=tile_T * 128 < columns)


@triton.jit(do_not_specialize=["scale_stride", "N"])
def _norm_kernel(
    x, parts, weight, total, normed, codes, scales, scale_stride, N, H, eps,
    PARTS: tl.constexpr, TILES: tl.constexpr, FP8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tile_T = tl.arange(0, TILES)
    column_TB = tile_T[:, None] * 128 + tl.arange(0, 128)[None, :]
    live_TB = column_TB < H
    at_TB = row.to(tl.int64) * H + column_TB
    x_TB = tl.load(x + at_TB, mask=live_TB, other=0.0).to(tl.float32)
    if PARTS > 0:
        more_TB = tl.zeros([TILES, 128], tl.float32)
        for part in tl.static_range(PARTS):
            part_at_TB = (part * N + row).to(tl.int64) * H + column_TB
            more_TB += tl.load(parts + part_at_TB, mask=live_TB, other=0.0).to(tl.float32)
        x_TB = to_bf16(x_TB + more_TB, INTERPRETED)
        tl.store(total + at_TB, x_TB, mask=live_TB)
        x_TB = x_TB.to(tl.float32)
    mean = tl.sum(tl.sum(x_TB * x_TB, axis=1), axis=0) / H
    weight_TB = tl.load(weight + column_TB, mask=live_TB, other=0.0).to(tl.float32)
    y_TB = to_bf16(x_TB * tl.rsqrt(mean + eps) * weight_TB, INTERPRETED)
    tl.store(normed + at_TB, y_TB, mask=live_TB)
    if FP8:
        store_fp8(y_TB.to(tl.float32), live_TB, tile_T, row, H, codes, scales, scale_stride, INTERPRETED)


def add_rms_norm(x_NH: Tensor, parts_SNH: Tensor | None, weight_H: Tensor, eps: float, in_fp8: bool = False) -> Normed:
    """The norm of x + the sum of parts (fp32 or bf16), whose sum is x itself where there are none."""
    take("x_NH", x_NH, (torch.bfloat16,), (2,), contiguous=True)
    rows, hidden = x_NH.shape
    parts = 0
    if parts_SNH is not None:
        take("parts_SNH", parts_SNH, (torch.float32, torch.bfloat16), (3,), contiguous=True)
        same_device(x_NH=x_NH, parts_SNH=parts_SNH)
        parts = len(parts_SNH)
        if list(parts_SNH.shape[1:]) != [rows, hidden]:
            raise ValueError(f"parts_SNH has shape {list(parts_SNH.shape)}; taken: (parts, {rows}, {hidden})")
    take("weight_H", weight_H, (torch.bfloat16, torch.float32), (1,), contiguous=True)
    if len(weight_H) != hidden:
        raise ValueError(f"weight_H has {len(weight_H)} values; taken: {hidden}")
    total_NH = torch.empty_like(x_NH) if parts else x_NH
    normed_NH = torch.empty_like(x_NH)
    quantised = empty_fp8(rows, hidden, x_NH.device) if in_fp8 else None
    if x_NH.numel():
        codes, scales = quantised or (normed_NH, normed_NH)
        tiles = triton.next_power_of_2(-(-hidden // 128))
        _norm_kernel[(rows,)](
            x_NH, x_NH if parts_SNH is None else parts_SNH, weight_H, total_NH, normed_NH, codes, scales,
            scales.stride(1), rows, hidden, eps, PARTS=parts, TILES=tiles, FP8=in_fp8, INTERPRETED=INTERPRETED,
            num_warps=4 if tiles <= 4 else 8 if tiles <= 16 else 16,
        )  # fmt: skip
    return Normed(total_NH, normed_NH, quantised)


def add_rms_norm_reference(
    x_NH: Tensor, parts_SNH: Tensor | None, weight_H: Tensor, eps: float, in_fp8: bool = False
) -> Normed:
    """The definition."""
    if parts_SNH is not None:
        x_NH = (x_NH.float() + parts_SNH.float().sum(0)).to(x_NH.dtype)
    normed_NH = F.rms_norm(x_NH.float(), weight_H.shape, weight_H.float(), eps).to(x_NH.dtype)
    return Normed(x_NH, normed_NH, Fp8(*quantize(normed_NH, ACTIVATION_BLOCK)) if in_fp8 else None)

"""SwiGLU between two products of a few rows: parts of gate and up added, multiplied, and rounded for the next product.

Floor, N rows: 2 S N I values in (fp32, or bf16 of a single part), N I out in FP8 or bf16; one launch where torch has
two, and the cast a third.

Shapes: N rows, I inner, S parts; i in blocks of 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from teacher.fp8 import ACTIVATION_BLOCK, quantize
from teacher.kernels.arguments import INTERPRETED, take
from teacher.kernels.operands import Fp8
from teacher.kernels.quantize import block_scale, encode, magnitude
from teacher.kernels.rms_norm import empty_fp8, to_bf16

_TILES = 4  # of a program


@triton.jit(do_not_specialize=["scale_stride", "N"])
def _swiglu_kernel(
    parts, out, codes, scales, scale_stride, N, inner,
    PARTS: tl.constexpr, TILES: tl.constexpr, FP8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0), tl.program_id(1) * TILES
    tile_T = first + tl.arange(0, TILES)
    column_TB = tile_T[:, None] * 128 + tl.arange(0, 128)[None, :]
    live_TB = column_TB < inner
    gate_TB = tl.zeros([TILES, 128], tl.float32)
    up_TB = tl.zeros([TILES, 128], tl.float32)
    for part in tl.static_range(PARTS):
        at_TB = (part * N + row).to(tl.int64) * inner * 2 + column_TB
        gate_TB += tl.load(parts + at_TB, mask=live_TB, other=0.0).to(tl.float32)
        up_TB += tl.load(parts + at_TB + inner, mask=live_TB, other=0.0).to(tl.float32)
    y_TB = gate_TB * tl.sigmoid(gate_TB) * up_TB
    at_TB = row.to(tl.int64) * inner + column_TB
    if FP8:
        scale_T = block_scale(tl.max(magnitude(y_TB), axis=1), False)
        tl.store(codes + at_TB, encode(y_TB, scale_T[:, None], INTERPRETED), mask=live_TB)
        tl.store(scales + tile_T.to(tl.int64) * scale_stride + row, scale_T, mask=tile_T * 128 < inner)
    else:
        tl.store(out + at_TB, to_bf16(y_TB, INTERPRETED), mask=live_TB)


def swiglu(parts_SNX: Tensor, in_fp8: bool = False) -> Tensor | Fp8:
    """silu(g) * u of rows [g, u] (X = 2 I) whose parts are added: (N, I) in bf16 or FP8."""
    take("parts_SNX", parts_SNX, (torch.float32, torch.bfloat16), (3,), contiguous=True)
    parts, rows, columns = parts_SNX.shape
    if columns % 2:
        raise ValueError(f"parts_SNX has {columns} columns; taken: an even number, gate's and up's")
    inner, device = columns // 2, parts_SNX.device
    x8 = empty_fp8(rows, inner, device) if in_fp8 else None
    out_NI = torch.empty(0 if in_fp8 else rows, inner, dtype=torch.bfloat16, device=device)
    if rows and inner:
        codes, scales = x8 or (out_NI, out_NI)
        _swiglu_kernel[(rows, -(-inner // (128 * _TILES)))](
            parts_SNX, out_NI, codes, scales, scales.stride(1), rows, inner, PARTS=parts, TILES=_TILES, FP8=in_fp8,
            INTERPRETED=INTERPRETED, num_warps=4,
        )  # fmt: skip
    return out_NI if x8 is None else x8


def swiglu_reference(parts_SNX: Tensor, in_fp8: bool = False) -> Tensor | Fp8:
    """The definition."""
    gate_NI, up_NI = parts_SNX.float().sum(0).chunk(2, dim=1)
    y_NI = F.silu(gate_NI) * up_NI
    return Fp8(*quantize(y_NI, ACTIVATION_BLOCK)) if in_fp8 else y_NI.bfloat16()

"""What all layers of a step are told about its tokens: where each is written in the paged cache, and by which angles it
is rotated. A launch each, where operators of torch are nine and three.

Of a step of few tokens each launch takes as long as that of a layer's norm. A few words a token.

Shapes: B sequences, T new tokens each (positions of a table in `angles`), P pages of a sequence, N tokens, D angles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arguments import same_device, take

_BLOCK = 128


@triton.jit(do_not_specialize=["N", "T", "stride"])
def _places_kernel(position, table, out, N, T, stride, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < N
    place = tl.load(position + at, mask=live, other=-1)
    real = place >= 0
    inside = tl.where(real, place, 0)
    page = tl.load(table + at // T * stride + inside // PAGE, mask=live & real, other=0).to(tl.int64)
    tl.store(out + at, tl.where(real, page * PAGE + inside % PAGE, 0), mask=live)


def places(position_BT: Tensor, table_BP: Tensor, page_size: int) -> Tensor:
    """Rows (B, T), int64, of the cache for tokens at these positions; those of padding (-1) go to row 0, nobody's."""
    take("position_BT", position_BT, (torch.int64,), (2,), contiguous=True)
    take("table_BP", table_BP, (torch.int32, torch.int64), (2,))
    same_device(position_BT=position_BT, table_BP=table_BP)
    if len(table_BP) != len(position_BT):
        raise ValueError(f"tables of {len(table_BP)} sequences for {len(position_BT)}; taken: one of each")
    out_BT = torch.empty_like(position_BT)
    if count := position_BT.numel():
        _places_kernel[(-(-count // _BLOCK),)](
            position_BT, table_BP, out_BT, count, position_BT.shape[1], table_BP.stride(0), PAGE=page_size,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out_BT


@triton.jit(do_not_specialize=["N"])
def _angles_kernel(position, cos, sin, cos_out, sin_out, N, HALF, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_D = tl.arange(0, BLOCK_D)
    live = (row < N)[:, None] & (at_D < HALF)[None, :]
    inside = tl.maximum(tl.load(position + row, mask=row < N, other=0), 0)
    source, target = inside[:, None] * HALF + at_D[None, :], row[:, None] * HALF + at_D[None, :]
    tl.store(cos_out + target, tl.load(cos + source, mask=live), mask=live)
    tl.store(sin_out + target, tl.load(sin + source, mask=live), mask=live)


def angles(position_N: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, D) of the rotation's tables, fp32, for tokens at these positions; padding (-1) has position 0's."""
    take("position_N", position_N, (torch.int64,), (1,), contiguous=True)
    for name, table in (("cos_TD", cos_TD), ("sin_TD", sin_TD)):
        take(name, table, (torch.float32,), (2,), contiguous=True)
    same_device(position_N=position_N, cos_TD=cos_TD, sin_TD=sin_TD)
    if cos_TD.shape != sin_TD.shape:
        raise ValueError(f"cos_TD is {list(cos_TD.shape)}, sin_TD {list(sin_TD.shape)}; taken: the same shape")
    count, half = len(position_N), cos_TD.shape[1]
    cos_ND, sin_ND = torch.empty(2, count, half, dtype=torch.float32, device=cos_TD.device)
    if count and half:
        _angles_kernel[(-(-count // 8),)](
            position_N, cos_TD, sin_TD, cos_ND, sin_ND, count, half, BLOCK_N=8,
            BLOCK_D=triton.next_power_of_2(half), num_warps=1,
        )  # fmt: skip
    return cos_ND, sin_ND

"""Where the new tokens of a step are written in the paged cache, in one launch: nine operators of torch otherwise.

Of a step of few tokens each is as long as the kernel that does the work of a layer's norm. A few words a token.

Shapes: B sequences, T new tokens each, P pages of a sequence.
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

"""From routing to rows and back: where each (token, expert) pair lies, and the weighted sum of what came of it.

`expert_rows` sorts the pairs by expert, stably, in one launch and without atomics, so that the same routing gives the
same rows every time. One program an expert reads all the ids twice: for 512 tokens that is 2 x 16 KB from the L2, and
what a decode step pays is one launch where torch's sort, search and scatter are nine. Floor: 4 M bytes in and 8 M out.

`combine` undoes the order and sums in one pass, in fp32 and always in the order of a token's own list of experts. Floor
for N tokens, K rows each: N H (2 K + 2) bytes, no arithmetic to speak of; for R1 129 KB a token, where the products of
a token's experts take 704 MFLOP: about 5% of their time.

With `shared` (how many), every token has so many more pairs, of weight 1, with the experts after the last routed one:
a shared expert of the routed experts' size, or of a multiple of it cut into several (SwiGLU is element-wise), then
rides in the same launches. At decode that saves three launches and hides its bytes behind the others'; for long prompts
it is one expert with many rows, as fast as a launch of its own.

Shapes: N tokens, K experts a token (with the shared ones), M = N K pairs and rows, E experts (with the shared ones), H
hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arguments import same_device, take
from teacher.kernels.operands import Groups


class Rows(NamedTuple):
    """Pairs in the order of their experts."""

    token_M: Tensor  # token of each row, int32
    row_NK: Tensor  # row of each pair, int32
    groups: Groups


@triton.jit
def _ids(indices, pair, pairs, K, last, SHARED: tl.constexpr):
    """Experts of these pairs; a token's last pairs are the shared ones, in their order."""
    slot, routed = pair % K, K - SHARED
    found = tl.load(indices + pair // K * routed + slot, mask=(pair < pairs) & (slot < routed), other=0).to(tl.int32)
    return tl.where(slot < routed, found, last - (K - 1 - slot))


@triton.jit(do_not_specialize=["pairs"])
def _rows_kernel(
    indices, token_M, row_NK, start_E, count_E, pairs, K, last,
    SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert. A pair's place is the number of pairs with smaller experts, or with this one and before it."""
    expert = tl.program_id(0)
    smaller = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        real = pair < pairs
        ids = _ids(indices, pair, pairs, K, last, SHARED)
        smaller += (real & (ids < expert)).to(tl.int32)
        equal += (real & (ids == expert)).to(tl.int32)
    place, count = tl.sum(smaller), tl.sum(equal)
    tl.store(start_E + expert, place)
    tl.store(count_E + expert, count)
    if count > 0:
        for first in range(0, pairs, BLOCK):
            pair = first + tl.arange(0, BLOCK)
            real = pair < pairs
            ids = _ids(indices, pair, pairs, K, last, SHARED)
            mine = real & (ids == expert)
            row = place + tl.cumsum(mine.to(tl.int32)) - 1
            tl.store(token_M + row, pair // K, mask=mine)
            tl.store(row_NK + pair, row, mask=mine)
            place += tl.sum(mine.to(tl.int32))


@triton.jit
def _combine_kernel(
    y, row_NK, weights, out, H,
    K: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    routed: tl.constexpr = K - SHARED
    for k in tl.static_range(K):
        row = tl.load(row_NK + token * K + k).to(tl.int64)
        value = tl.load(y + row * H + column, mask=column < H, other=0.0).to(tl.float32)
        if k < routed:
            value *= tl.load(weights + token * routed + k)
        total += value
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)


def expert_rows(indices_NK: Tensor, experts: int, shared: int = 0) -> Rows:
    """Rows for `experts` routed experts and `shared` more. Ids must lie in [0, experts): on the device they are
    not looked at by the host."""
    take("indices_NK", indices_NK, (torch.int64, torch.int32), (2,), contiguous=True)
    tokens, k = indices_NK.shape[0], indices_NK.shape[1] + shared
    pairs, experts = tokens * k, experts + shared

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=indices_NK.device)

    rows = Rows(new(pairs), new(tokens, k), Groups(new(experts), new(experts)))
    block = min(4096, max(128, triton.next_power_of_2(pairs)))
    _rows_kernel[(experts,)](
        indices_NK, rows.token_M, rows.row_NK, *rows.groups, pairs, k, experts - 1, SHARED=int(shared), BLOCK=block,
        num_warps=8 if block >= 1024 else 4,
    )  # fmt: skip
    return rows


def combine(y_MH: Tensor, rows: Rows, weights_NK: Tensor, shared: int = 0, out_NH: Tensor | None = None) -> Tensor:
    """Sum over each token's rows of weight times row, in fp32, rounded once; bf16 or in `out_NH`'s dtype."""
    floats = (torch.bfloat16, torch.float32)
    take("y_MH", y_MH, floats, (2,), contiguous=True)
    take("weights_NK", weights_NK, (torch.float32,), (2,), contiguous=True)
    same_device(y_MH=y_MH, row_NK=rows.row_NK, weights_NK=weights_NK)
    (tokens, k), hidden = rows.row_NK.shape, y_MH.shape[1]
    if list(weights_NK.shape) != [tokens, k - shared]:
        raise ValueError(f"weights_NK has shape {list(weights_NK.shape)}; taken: {[tokens, k - shared]}")
    if out_NH is None:
        out_NH = torch.empty(tokens, hidden, dtype=y_MH.dtype, device=y_MH.device)
    take("out_NH", out_NH, floats, (2,), contiguous=True)
    if tokens:
        block = min(1024, max(128, triton.next_power_of_2(hidden)))
        grid = (tokens, triton.cdiv(hidden, block))
        _combine_kernel[grid](
            y_MH,
            rows.row_NK,
            weights_NK,
            out_NH,
            hidden,
            K=k,
            SHARED=int(shared),
            BLOCK=block,
            num_warps=4,
        )
    return out_NH


def expert_rows_reference(indices_NK: Tensor, experts: int, shared: int = 0) -> Rows:
    """The definition, by torch's stable sort."""
    tokens = len(indices_NK)
    if shared:
        more_S = torch.arange(experts, experts + shared, device=indices_NK.device, dtype=indices_NK.dtype)
        indices_NK = torch.cat([indices_NK, more_S.expand(tokens, -1)], dim=1)
    order_M = indices_NK.flatten().sort(stable=True).indices
    row_NK = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    count_E = indices_NK.flatten().bincount(minlength=experts + shared)
    token_M = order_M // indices_NK.shape[1]
    groups = Groups((count_E.cumsum(0) - count_E).int(), count_E.int())
    return Rows(token_M.int(), row_NK.view_as(indices_NK).int(), groups)


def combine_reference(y_MH: Tensor, rows: Rows, weights_NK: Tensor, shared: int = 0) -> Tensor:
    """The definition, in fp32."""
    if shared:
        weights_NK = torch.cat([weights_NK, weights_NK.new_ones(len(weights_NK), shared)], dim=1)
    return (y_MH[rows.row_NK.long()].float() * weights_NK[:, :, None]).sum(1)

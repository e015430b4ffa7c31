"""The experts of very few tokens in two launches: each (token, expert) pair by itself, without sorting.

For one token the five launches of `expert_layer` cost a fifth of its time. Here the first kernel does gate, up and
SwiGLU for 128 hidden values of one pair, and rounds them to FP8, a tile; the second does 64 outputs of a token over a
few of its pairs, weighted, and leaves them as parts (see row_product) for the norm that follows. Hidden states come in
FP8 from the norm before. Weights may be in bf16 too, and then everything is, without scales. What several tokens have
in common (the shared expert) is read by each, the second time from the L2: from three tokens on sorting is faster,
measured (docs/r1-layer.md).

Floor for one token of R1's: 396 MB of weights, 92 us at 4.3 TB/s; for two 748 MB, 174 us.

Shapes: N tokens, K pairs a token (routed and shared), M = N K pairs, H hidden, I inner, E experts, S parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from teacher.fp8 import FP8
from teacher.kernels.arguments import INTERPRETED, multiprocessors, same_device, take
from teacher.kernels.operands import Fp8
from teacher.kernels.quantize import block_scale, encode, magnitude
from teacher.kernels.rms_norm import empty_fp8, to_bf16

_ROWS = 16  # of the instruction's free dimension: one is the pair's, the others are not looked at


@triton.jit
def _expert_of(indices, token, slot, K, experts, SHARED: tl.constexpr):
    """Of a token's pairs the last are the shared experts, which stand last in the stack."""
    routed = K - SHARED
    found = tl.load(indices + token * routed + slot, mask=slot < routed, other=0).to(tl.int32)
    return tl.where(slot < routed, found, experts - K + slot)


@triton.jit(do_not_specialize=["x_scale_stride", "out_scale_stride"])
def _gate_up_kernel(
    x_rows, w_rows, x_scales, x_scale_stride, w_scales, indices, out, out_scales, out_scale_stride, K, experts, H,
    inner, SHARED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, QUANTISED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 128
    block, pair = tl.program_id(0), tl.program_id(1)
    token = pair // K
    expert = _expert_of(indices, token, pair % K, K, experts, SHARED)
    steps, blocks = tl.cdiv(H, STEP), tl.cdiv(inner, BLOCK)
    gate_row = expert * inner * 2 + block * BLOCK
    scale_at = w_scales + (expert * blocks * 2 + block) * steps
    gate = tl.zeros([BLOCK, ROWS], tl.float32)
    up = tl.zeros([BLOCK, ROWS], tl.float32)
    for k in tl.range(0, steps):
        x = x_rows.load([token, k * STEP])
        gate_w, up_w = w_rows.load([gate_row, k * STEP]), w_rows.load([gate_row + inner, k * STEP])
        if QUANTISED:
            x_scale = tl.load(x_scales + k * x_scale_stride + token)
            gate += tl.dot(gate_w, x.T) * (x_scale * tl.load(scale_at + k))
            up += tl.dot(up_w, x.T) * (x_scale * tl.load(scale_at + blocks * steps + k))
        else:
            if INTERPRETED:  # its products in bf16 are wrong
                x, gate_w, up_w = x.to(tl.float32), gate_w.to(tl.float32), up_w.to(tl.float32)
            gate += tl.dot(gate_w, x.T)
            up += tl.dot(up_w, x.T)
    own = tl.arange(0, ROWS)[None, :] == 0
    gate_B, up_B = tl.sum(tl.where(own, gate, 0.0), axis=1), tl.sum(tl.where(own, up, 0.0), axis=1)
    column_B = block * BLOCK + tl.arange(0, BLOCK)
    hidden_B = tl.where(column_B < inner, gate_B * tl.sigmoid(gate_B) * up_B, 0.0)
    if QUANTISED:
        scale = block_scale(tl.max(magnitude(hidden_B), axis=0), False)
        tl.store(out + pair * inner + column_B, encode(hidden_B, scale, INTERPRETED), mask=column_B < inner)
        tl.store(out_scales + block * out_scale_stride + pair, scale)
    else:
        tl.store(out + pair * inner + column_B, to_bf16(hidden_B, INTERPRETED), mask=column_B < inner)


@triton.jit(do_not_specialize=["h_scale_stride", "N", "each"])
def _down_kernel(
    h_rows, w_rows, h_scales, h_scale_stride, w_scales, indices, weights, out, N, K, experts, H, inner, each,
    SHARED: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    QUANTISED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    column, part, token = tl.program_id(0) * COLUMNS, tl.program_id(1), tl.program_id(2)
    steps = tl.cdiv(inner, STEP)
    first = part * each
    slots = tl.minimum(each, K - first)
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    # Read before the loop: a load of the loop's that another one waits for would halve the stages.
    at_S = tl.arange(0, SLOTS)
    expert_S = _expert_of(indices, token, at_S, K, experts, SHARED)
    weight_S = tl.load(weights + token * (K - SHARED) + at_S, mask=at_S < K - SHARED, other=1.0)
    for index in tl.range(0, slots * steps):
        slot, k = first + index // steps, index % steps
        pair = token * K + slot
        mine_S = at_S == slot
        expert, weight = tl.sum(tl.where(mine_S, expert_S, 0), axis=0), tl.sum(tl.where(mine_S, weight_S, 0.0), axis=0)
        h = h_rows.load([pair, k * STEP])
        w = w_rows.load([expert * H + column, k * STEP])
        if QUANTISED:
            h_scale = tl.load(h_scales + k * h_scale_stride + pair)
            w_scale = tl.load(w_scales + (expert * tl.cdiv(H, STEP) + column // STEP) * steps + k)
            total += tl.dot(w, h.T) * (h_scale * w_scale * weight)
        else:
            if INTERPRETED:
                h, w = h.to(tl.float32), w.to(tl.float32)
            total += tl.dot(w, h.T) * weight
    own = tl.arange(0, ROWS)[None, :] == 0
    total_C = tl.sum(tl.where(own, total, 0.0), axis=1)
    column_C = column + tl.arange(0, COLUMNS)
    tl.store(out + (part * N + token).to(tl.int64) * H + column_C, total_C, mask=column_C < H)


class Cut(NamedTuple):
    """How the two launches are cut up."""

    gate_stages: int
    share: int  # pairs a part of the second
    down_stages: int


def cut(tokens: int, k: int, blocks: int, tiles: int, processors: int) -> Cut:
    """For `blocks` of hidden values and `tiles` of outputs: programs all of which fit the chip at one time, since a
    second round of a few takes as long as the first; stages as many as shared memory then holds (227 KB: 34 a stage of
    the first kernel, 10 of the second)."""
    parts = min(k, -(-2 * processors // max(1, tiles * tokens)))
    share = -(-k // parts)
    programs = tiles * tokens * -(-k // share)
    return Cut(3 if blocks * tokens * k <= 2 * processors else 2, share, 6 if programs <= 3 * processors else 4)


def expert_pairs(
    x: Fp8 | Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up: Fp8 | Tensor, down: Fp8 | Tensor, shared: int = 0,
    share: int | None = None,
) -> Tensor:  # fmt: skip
    """`expert_layer` of hidden states in FP8, (N, H) with scales (N, h) as `quantize_activations` gives them, or of
    hidden states and weights in bf16: parts (S, N, H) in fp32 of `share` pairs each, whose sum is the result."""
    quantised = isinstance(x, Fp8) and isinstance(gate_up, Fp8) and isinstance(down, Fp8)
    given = tuple(each.values if isinstance(each, Fp8) else each for each in (x, gate_up, down))
    x_NH, gate_up_E2IH, down_EHI = given
    dtypes = (FP8,) if quantised else (torch.bfloat16,)
    for name, each, dims in (("x", x_NH, 2), ("gate_up", gate_up_E2IH, 3), ("down", down_EHI, 3)):
        take(name, each, dtypes, (dims,), contiguous=True)
    take("indices_NK", indices_NK, (torch.int64, torch.int32), (2,), contiguous=True)
    take("weights_NK", weights_NK, (torch.float32,), (2,), contiguous=True)
    same_device(x=x_NH, indices_NK=indices_NK, weights_NK=weights_NK, gate_up=gate_up_E2IH, down=down_EHI)
    (tokens, hidden), (experts, _, inner) = x_NH.shape, down_EHI.shape
    k = indices_NK.shape[1] + shared
    wanted = [experts, 2 * inner, hidden], [experts, hidden, inner], [tokens, k - shared]
    found = list(gate_up_E2IH.shape), list(down_EHI.shape), list(weights_NK.shape)
    if found != wanted or len(indices_NK) != tokens:
        raise ValueError(f"gate_up, down and weights_NK have shapes {found}; taken: {wanted}")
    if hidden % 16 or inner % 16:
        raise ValueError(f"experts of hidden size {hidden} and intermediate size {inner}; taken: multiples of 16 (TMA)")
    scales = given
    h, i = -(-hidden // 128), -(-inner // 128)
    if isinstance(x, Fp8) and isinstance(gate_up, Fp8) and isinstance(down, Fp8):
        scales = x.scales, gate_up.scales, down.scales
        shapes = [tokens, h], [experts, 2 * i, h], [experts, h, i]
        for name, each, shape in zip(("x", "gate_up", "down"), scales, shapes, strict=True):
            if each.dtype != torch.float32 or list(each.shape) != shape:
                raise ValueError(f"{name}.scales is {each.dtype} of {list(each.shape)}; taken: float32 of {shape}")
    pairs, device, step, tiles = tokens * k, x_NH.device, 128 if quantised else 64, -(-hidden // 64)
    chosen = cut(tokens, k, i, tiles, multiprocessors(device))
    share = share or chosen.share
    parts_SNH = torch.empty(-(-k // share), tokens, hidden, dtype=torch.float32, device=device)
    if not pairs:
        return parts_SNH
    middle = empty_fp8(pairs, inner, device) if quantised else None
    hidden_MI = torch.empty(0 if quantised else pairs, inner, dtype=torch.bfloat16, device=device)
    codes, h_scales = middle or (hidden_MI, hidden_MI)
    _gate_up_kernel[(i, pairs)](
        TensorDescriptor.from_tensor(x_NH, [_ROWS, step]),
        TensorDescriptor.from_tensor(gate_up_E2IH.view(-1, hidden), [128, step]),
        scales[0], scales[0].stride(1), scales[1], indices_NK, codes, h_scales, h_scales.stride(1), k,
        experts, hidden, inner, SHARED=int(shared), ROWS=_ROWS, STEP=step, QUANTISED=quantised,
        INTERPRETED=INTERPRETED, num_warps=4, num_stages=chosen.gate_stages,
    )  # fmt: skip
    _down_kernel[(tiles, len(parts_SNH), tokens)](
        TensorDescriptor.from_tensor(codes, [_ROWS, step]),
        TensorDescriptor.from_tensor(down_EHI.view(-1, inner), [64, step]),
        h_scales, h_scales.stride(1), scales[2], indices_NK, weights_NK, parts_SNH, tokens, k, experts, hidden, inner,
        share, SHARED=int(shared), SLOTS=triton.next_power_of_2(k), ROWS=_ROWS, COLUMNS=64, STEP=step,
        QUANTISED=quantised, INTERPRETED=INTERPRETED, num_warps=4, num_stages=chosen.down_stages,
    )  # fmt: skip
    return parts_SNH

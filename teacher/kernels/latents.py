"""From the joint product of a layer's input to queries' latents and the cache's rows, in one launch.

The product holds, a token, [query latent (or, without one, the queries) | key-value latent | rotary key], in parts (see
row_product). The query latent is normalised, and rounded to FP8 where q_b_proj is in FP8; the key-value latent is
normalised and written, with the rotated key behind it, to the token's place in the cache: two norms, a rotation, two
concatenations and a scatter otherwise. Floor, a token: 4 S (Q + C) bytes in, 2 (Q + C) out.

Everything is rounded to bf16 where `teacher.attention` rounds it.

Shapes: N tokens, Q query latent, R key-value latent, D rotary key, C = R + D, S parts, W values of a cache's row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.fp8 import ACTIVATION_BLOCK, quantize
from teacher.kernels.arguments import INTERPRETED, same_device, take
from teacher.kernels.operands import Fp8
from teacher.kernels.rms_norm import empty_fp8, store_fp8, to_bf16
from teacher.norm import RMSNorm
from teacher.rope import rotate


class Rotation(NamedTuple):
    """Of each token: cos and sin (N, D/2) fp32, and how pairs lie in what is rotated (`teacher.rope.rotate`)."""

    cos_ND: Tensor
    sin_ND: Tensor
    interleave: bool


@triton.jit
def _rounded_sum(parts, N, row, columns, at, live, PARTS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Parts of a row's columns `at`, added, rounded to bf16, in fp32."""
    total = tl.zeros(at.shape, tl.float32)
    for part in tl.static_range(PARTS):
        place = parts + (part * N + row).to(tl.int64) * columns + at
        total += tl.load(place, mask=live, other=0.0).to(tl.float32)
    return to_bf16(total, INTERPRETED).to(tl.float32)


@triton.jit(do_not_specialize=["scale_stride", "N"])
def _latents_kernel(
    parts, q_weight, q, codes, scales, scale_stride, kv_weight, cos, sin, place_N, cache, N, Q, R, D, WIDTH, q_eps,
    kv_eps, PARTS: tl.constexpr, NORM: tl.constexpr, FP8: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, INTERLEAVE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program (token, 0) does the query latent, (token, 1) what is cached."""
    row = tl.program_id(0)
    columns = Q + R + D
    if tl.program_id(1) == 0:
        tile_T = tl.arange(0, TILES)
        at_TB = tile_T[:, None] * 128 + tl.arange(0, 128)[None, :]
        live_TB = at_TB < Q
        x_TB = _rounded_sum(parts, N, row, columns, at_TB, live_TB, PARTS, INTERPRETED)
        if NORM:
            mean = tl.sum(tl.sum(x_TB * x_TB, axis=1), axis=0) / Q
            weight_TB = tl.load(q_weight + at_TB, mask=live_TB, other=0.0).to(tl.float32)
            x_TB = to_bf16(x_TB * tl.rsqrt(mean + q_eps) * weight_TB, INTERPRETED).to(tl.float32)
        if FP8:
            store_fp8(x_TB, live_TB, tile_T, row, Q, codes, scales, scale_stride, INTERPRETED)
        else:
            tl.store(q + row.to(tl.int64) * Q + at_TB, x_TB.to(tl.bfloat16), mask=live_TB)
    else:
        target = cache + tl.load(place_N + row).to(tl.int64) * WIDTH
        at_R = tl.arange(0, BLOCK_R)
        x_R = _rounded_sum(parts, N, row, columns, Q + at_R, at_R < R, PARTS, INTERPRETED)
        mean = tl.sum(x_R * x_R, axis=0) / R
        weight_R = tl.load(kv_weight + at_R, mask=at_R < R, other=0.0).to(tl.float32)
        kv_R = to_bf16(x_R * tl.rsqrt(mean + kv_eps) * weight_R, INTERPRETED)
        tl.store(target + at_R, kv_R, mask=at_R < R)
        at_D = tl.arange(0, BLOCK_D)
        live_D = at_D < D // 2
        first_at = Q + R + at_D * 2 if INTERLEAVE else Q + R + at_D
        first_D = _rounded_sum(parts, N, row, columns, first_at, live_D, PARTS, INTERPRETED)
        other_at = first_at + 1 if INTERLEAVE else first_at + D // 2
        second_D = _rounded_sum(parts, N, row, columns, other_at, live_D, PARTS, INTERPRETED)
        cos_D = tl.load(cos + row * (D // 2) + at_D, mask=live_D, other=0.0)
        sin_D = tl.load(sin + row * (D // 2) + at_D, mask=live_D, other=0.0)
        turned_D = to_bf16(first_D * cos_D - second_D * sin_D, INTERPRETED)
        tl.store(target + R + at_D, turned_D, mask=live_D)
        turned_D = to_bf16(second_D * cos_D + first_D * sin_D, INTERPRETED)
        tl.store(target + R + D // 2 + at_D, turned_D, mask=live_D)


def write_latents(
    parts_SNX: Tensor, q_norm: RMSNorm | None, kv_norm: RMSNorm, rotation: Rotation, place_N: Tensor, rows_PW: Tensor,
    in_fp8: bool = False,
) -> Tensor | Fp8:  # fmt: skip
    """Writes each token's latent and rotary key to its place among `rows_PW` (bf16, C wide); gives the query latents
    (N, Q), in bf16 or FP8. Places are taken at most once, but for 0, which nobody reads."""
    take("parts_SNX", parts_SNX, (torch.float32, torch.bfloat16), (3,), contiguous=True)
    take("rows_PW", rows_PW, (torch.bfloat16,), (2,), contiguous=True)
    take("place_N", place_N, (torch.int32, torch.int64), (1,), contiguous=True)
    for name, table in (("cos", rotation.cos_ND), ("sin", rotation.sin_ND)):
        take(name, table, (torch.float32,), (2,), contiguous=True)
    same_device(parts_SNX=parts_SNX, rows_PW=rows_PW, place_N=place_N, cos=rotation.cos_ND)
    (parts, rows, columns), rank = parts_SNX.shape, len(kv_norm.weight)
    rope = 2 * rotation.cos_ND.shape[1]
    queries = columns - rank - rope
    if rows_PW.shape[1] != rank + rope or len(place_N) != rows or len(rotation.cos_ND) != rows:
        raise ValueError(
            f"{rows} tokens of {rank} + {rope} values, {len(place_N)} places, {len(rotation.cos_ND)} rotations, "
            f"rows of {rows_PW.shape[1]}; taken: as many of each, rows of {rank + rope}"
        )
    x8 = empty_fp8(rows, queries, parts_SNX.device) if in_fp8 else None
    q_NQ = torch.empty(0 if in_fp8 else rows, queries, dtype=torch.bfloat16, device=parts_SNX.device)
    if rows:
        codes, scales = x8 or (q_NQ, q_NQ)
        _latents_kernel[(rows, 2)](
            parts_SNX, kv_norm.weight if q_norm is None else q_norm.weight, q_NQ, codes, scales, scales.stride(1),
            kv_norm.weight, rotation.cos_ND, rotation.sin_ND, place_N, rows_PW, rows, queries, rank, rope,
            rows_PW.shape[1], kv_norm.eps if q_norm is None else q_norm.eps, kv_norm.eps, PARTS=parts,
            NORM=q_norm is not None, FP8=in_fp8, TILES=triton.next_power_of_2(-(-queries // 128)),
            BLOCK_R=triton.next_power_of_2(rank), BLOCK_D=triton.next_power_of_2(rope // 2),
            INTERLEAVE=rotation.interleave, INTERPRETED=INTERPRETED, num_warps=4,
        )  # fmt: skip
    return q_NQ if x8 is None else x8


def write_latents_reference(
    parts_SNX: Tensor, q_norm: RMSNorm | None, kv_norm: RMSNorm, rotation: Rotation, place_N: Tensor, rows_PW: Tensor,
    in_fp8: bool = False,
) -> Tensor | Fp8:  # fmt: skip
    """The definition."""
    rank, rope = len(kv_norm.weight), 2 * rotation.cos_ND.shape[1]
    x_NX = parts_SNX.float().sum(0).to(torch.bfloat16)
    q_NQ, kv_NR, k_ND = x_NX.split((x_NX.shape[1] - rank - rope, rank, rope), dim=1)
    rows_PW[place_N.long(), :rank] = kv_norm(kv_NR)
    rows_PW[place_N.long(), rank:] = rotate(k_ND, rotation.cos_ND, rotation.sin_ND, rotation.interleave)
    q_NQ = q_NQ.contiguous() if q_norm is None else q_norm(q_NQ)
    return Fp8(*quantize(q_NQ, ACTIVATION_BLOCK)) if in_fp8 else q_NQ

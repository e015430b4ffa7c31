"""What attention does head by head around its core: queries into the latent space, attended latents out of it.

Prefill, which rebuilds keys, has `join`: heads of both parts, written once (torch concatenates a value at a time).

`absorb`: each head's query times its half of kv_b_proj, and its rotary part rotated: a split, a batched product, a
rotation and copies otherwise. `values`: each head's attended latent times the other half, and, where a head's value is
a tile of 128 and o_proj reads FP8, rounded on the way. Floor, H heads: 2 H R (N + V) bytes of weights over both, and
per token 2 H (K + R + D) and 2 H (R + V) of activations.

Shapes: N tokens, H heads, K = P + D a query head with P and D values without and with position, R latent, V value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.fp8 import ACTIVATION_BLOCK, quantize
from teacher.kernels.arguments import INTERPRETED, same_device, take
from teacher.kernels.latents import Rotation
from teacher.kernels.operands import Fp8
from teacher.kernels.quantize import block_scale, encode, magnitude
from teacher.kernels.rms_norm import empty_fp8, to_bf16
from teacher.rope import rotate


@triton.jit(do_not_specialize=["N"])
def _absorb_kernel(
    q, up, cos, sin, q_latent, q_rope, N, H, up_stride_h, up_stride_p,
    P: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BLOCK_R columns of one head for ROWS tokens; the first of a head's programs rotates too."""
    head, column = tl.program_id(0), tl.program_id(1) * BLOCK_R
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = row < N
    at_P, at_R = tl.arange(0, BLOCK_P), column + tl.arange(0, BLOCK_R)
    start = (row.to(tl.int64) * H + head) * (P + D)
    q_NP = tl.load(q + start[:, None] + at_P[None, :], mask=real[:, None] & (at_P < P)[None, :], other=0.0)
    up_PR = tl.load(
        up + head.to(tl.int64) * up_stride_h + at_P[:, None] * up_stride_p + at_R[None, :],
        mask=(at_P < P)[:, None] & (at_R < R)[None, :], other=0.0,
    )  # fmt: skip
    if INTERPRETED:  # its products in bf16 are wrong
        q_NP, up_PR = q_NP.to(tl.float32), up_PR.to(tl.float32)
    out_NR = to_bf16(tl.dot(q_NP, up_PR), INTERPRETED)
    place = (row.to(tl.int64) * H + head) * R
    tl.store(q_latent + place[:, None] + at_R[None, :], out_NR, mask=real[:, None] & (at_R < R)[None, :])
    if column == 0:
        at_D = tl.arange(0, BLOCK_D)
        live = real[:, None] & (at_D < D // 2)[None, :]
        first_at = start[:, None] + P + (at_D[None, :] * 2 if INTERLEAVE else at_D[None, :])
        first = tl.load(q + first_at, mask=live, other=0.0).to(tl.float32)
        second = tl.load(q + first_at + (1 if INTERLEAVE else D // 2), mask=live, other=0.0).to(tl.float32)
        angle = row[:, None] * (D // 2) + at_D[None, :]
        cos_ND, sin_ND = tl.load(cos + angle, mask=live, other=0.0), tl.load(sin + angle, mask=live, other=0.0)
        turned = q_rope + (row.to(tl.int64) * H + head)[:, None] * D + at_D[None, :]
        tl.store(turned, to_bf16(first * cos_ND - second * sin_ND, INTERPRETED), mask=live)
        tl.store(turned + D // 2, to_bf16(second * cos_ND + first * sin_ND, INTERPRETED), mask=live)


def absorb(q_NHK: Tensor, up_HPR: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Queries in the latent space (N, H, R) and their rotated parts (N, H, D), bf16; up_HPR may be a slice of heads."""
    take("q_NHK", q_NHK, (torch.bfloat16,), (3,), contiguous=True)
    take("up_HPR", up_HPR, (torch.bfloat16,), (3,))
    same_device(q_NHK=q_NHK, up_HPR=up_HPR, cos=rotation.cos_ND)
    (rows, heads, size), (up_heads, nope, rank) = q_NHK.shape, up_HPR.shape
    rope = 2 * rotation.cos_ND.shape[1]
    if heads != up_heads or size != nope + rope or len(rotation.cos_ND) != rows:
        raise ValueError(
            f"q_NHK has shape {list(q_NHK.shape)}, up_HPR {list(up_HPR.shape)}, {len(rotation.cos_ND)} rotations of "
            f"{rope}; taken: as many heads and tokens, and heads of both sizes together"
        )
    q_latent_NHR = torch.empty(rows, heads, rank, dtype=torch.bfloat16, device=q_NHK.device)
    q_rope_NHD = torch.empty(rows, heads, rope, dtype=torch.bfloat16, device=q_NHK.device)
    if rows:
        tile_rows = min(64, max(16, triton.next_power_of_2(rows)))
        block = min(128, max(16, triton.next_power_of_2(rank)))
        _absorb_kernel[(heads, -(-rank // block), -(-rows // tile_rows))](
            q_NHK, up_HPR, rotation.cos_ND, rotation.sin_ND, q_latent_NHR, q_rope_NHD, rows, heads,
            up_HPR.stride(0), up_HPR.stride(1), P=nope, D=rope, R=rank, ROWS=tile_rows,
            BLOCK_P=max(16, triton.next_power_of_2(nope)), BLOCK_R=block, BLOCK_D=triton.next_power_of_2(rope // 2),
            INTERLEAVE=rotation.interleave, INTERPRETED=INTERPRETED, num_warps=4,
        )  # fmt: skip
    return q_latent_NHR, q_rope_NHD


def absorb_reference(q_NHK: Tensor, up_HPR: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """The definition."""
    q_nope_NHP, q_rope_NHD = q_NHK.split((up_HPR.shape[1], q_NHK.shape[2] - up_HPR.shape[1]), dim=2)
    latent_NHR = torch.einsum("nhp,hpr->nhr", q_nope_NHP.float(), up_HPR.float()).to(q_NHK.dtype)
    cos, sin = rotation.cos_ND.unsqueeze(1), rotation.sin_ND.unsqueeze(1)
    return latent_NHR, rotate(q_rope_NHD, cos, sin, rotation.interleave)


@triton.jit(do_not_specialize=["scale_stride", "N"])
def _values_kernel(
    attended, up, out, codes, scales, scale_stride, N, H, up_stride_h, up_stride_v,
    V: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    FP8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One head for ROWS tokens, transposed: the head's values are the instruction's rows."""
    head = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < N
    at_V = tl.arange(0, BLOCK_V)
    total_VN = tl.zeros([BLOCK_V, ROWS], tl.float32)
    start = (row.to(tl.int64) * H + head) * R
    for column in tl.range(0, R, BLOCK_R):
        at_R = column + tl.arange(0, BLOCK_R)
        a_NR = tl.load(attended + start[:, None] + at_R[None, :], mask=real[:, None] & (at_R < R)[None, :], other=0.0)
        up_VR = tl.load(
            up + head.to(tl.int64) * up_stride_h + at_V[:, None] * up_stride_v + at_R[None, :],
            mask=(at_V < V)[:, None] & (at_R < R)[None, :], other=0.0,
        )  # fmt: skip
        if INTERPRETED:
            a_NR, up_VR = a_NR.to(tl.float32), up_VR.to(tl.float32)
        total_VN += tl.dot(up_VR, a_NR.T)
    value_NV = to_bf16(tl.trans(total_VN), INTERPRETED)
    place = (row.to(tl.int64) * H + head)[:, None] * V + at_V[None, :]
    live = real[:, None] & (at_V < V)[None, :]
    if FP8:
        value_NV = value_NV.to(tl.float32)
        scale_N = block_scale(tl.max(magnitude(value_NV), axis=1), False)
        tl.store(codes + place, encode(value_NV, scale_N[:, None], INTERPRETED), mask=live)
        tl.store(scales + head.to(tl.int64) * scale_stride + row, scale_N, mask=real)
    else:
        tl.store(out + place, value_NV, mask=live)


def values(attended_NHR: Tensor, up_HVR: Tensor, in_fp8: bool = False) -> Tensor | Fp8:
    """Each head's values (N, H V), in bf16, or in FP8 where V is 128, the tile."""
    take("attended_NHR", attended_NHR, (torch.bfloat16,), (3,), contiguous=True)
    take("up_HVR", up_HVR, (torch.bfloat16,), (3,))
    same_device(attended_NHR=attended_NHR, up_HVR=up_HVR)
    (rows, heads, rank), (up_heads, size, up_rank) = attended_NHR.shape, up_HVR.shape
    if (heads, rank) != (up_heads, up_rank):
        raise ValueError(f"attended_NHR has shape {list(attended_NHR.shape)}, up_HVR {list(up_HVR.shape)}")
    if in_fp8 and size != 128:
        raise ValueError(f"heads of {size} values; taken in FP8: 128, a tile")
    x8 = empty_fp8(rows, heads * size, attended_NHR.device) if in_fp8 else None
    out = torch.empty(0 if in_fp8 else rows, heads * size, dtype=torch.bfloat16, device=attended_NHR.device)
    if rows:
        codes, scales = x8 or (out, out)
        tile_rows = min(64, max(16, triton.next_power_of_2(rows)))
        _values_kernel[(heads, -(-rows // tile_rows))](
            attended_NHR, up_HVR, out, codes, scales, scales.stride(1), rows, heads, up_HVR.stride(0),
            up_HVR.stride(1), V=size, R=rank, ROWS=tile_rows, BLOCK_V=max(16, triton.next_power_of_2(size)),
            BLOCK_R=min(128, max(16, triton.next_power_of_2(rank))), FP8=in_fp8, INTERPRETED=INTERPRETED,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out if x8 is None else x8


def values_reference(attended_NHR: Tensor, up_HVR: Tensor, in_fp8: bool = False) -> Tensor | Fp8:
    """The definition."""
    out = torch.einsum("nhr,hvr->nhv", attended_NHR.float(), up_HVR.float()).to(attended_NHR.dtype).flatten(1)
    return Fp8(*quantize(out, ACTIVATION_BLOCK)) if in_fp8 else out


@triton.jit(do_not_specialize=["N"])
def _join_kernel(
    nope, rope, cos, sin, out, N, H, nope_n, nope_h, rope_n, rope_h,
    P: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token."""
    row = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = (head_H < H)[:, None]
    at_P, at_D = tl.arange(0, BLOCK_P)[None, :], tl.arange(0, BLOCK_D)[None, :]
    target = out + (row * H + head_H[:, None]) * (P + D)
    live = real & (at_P < P)
    tl.store(target + at_P, tl.load(nope + row * nope_n + head_H[:, None] * nope_h + at_P, mask=live), mask=live)
    source = rope + row * rope_n + head_H[:, None] * rope_h
    live = real & (at_D < D // 2)
    if ROTATE:
        first_at = source + (at_D * 2 if INTERLEAVE else at_D)
        first = tl.load(first_at, mask=live, other=0.0).to(tl.float32)
        second = tl.load(first_at + (1 if INTERLEAVE else D // 2), mask=live, other=0.0).to(tl.float32)
        cos_D = tl.load(cos + row * (D // 2) + at_D, mask=at_D < D // 2, other=0.0)
        sin_D = tl.load(sin + row * (D // 2) + at_D, mask=at_D < D // 2, other=0.0)
        tl.store(target + P + at_D, to_bf16(first * cos_D - second * sin_D, INTERPRETED), mask=live)
        tl.store(target + P + D // 2 + at_D, to_bf16(second * cos_D + first * sin_D, INTERPRETED), mask=live)
    else:
        tl.store(target + P + at_D, tl.load(source + at_D, mask=live), mask=live)
        tl.store(target + P + D // 2 + at_D, tl.load(source + D // 2 + at_D, mask=live), mask=live)


def join(nope_NHP: Tensor, rope_NHD: Tensor, rotation: Rotation | None = None) -> Tensor:
    """Heads (N, H, P + D) of both parts, the second rotated if `rotation` is given; bf16, of any strides but the last
    (a rotary key that all heads share is expanded)."""
    for name, each in (("nope_NHP", nope_NHP), ("rope_NHD", rope_NHD)):
        take(name, each, (torch.bfloat16,), (3,))
    same_device(nope_NHP=nope_NHP, rope_NHD=rope_NHD)
    (rows, heads, nope), rope = nope_NHP.shape, rope_NHD.shape[2]
    if rope_NHD.shape[:2] != nope_NHP.shape[:2] or rope % 2:
        raise ValueError(f"nope_NHP has shape {list(nope_NHP.shape)}, rope_NHD {list(rope_NHD.shape)}")
    if rotation is not None and list(rotation.cos_ND.shape) != [rows, rope // 2]:
        raise ValueError(f"rotations are {list(rotation.cos_ND.shape)}; taken: {[rows, rope // 2]}")
    out_NHK = torch.empty(rows, heads, nope + rope, dtype=torch.bfloat16, device=nope_NHP.device)
    if rows:
        cos, sin = (nope_NHP, nope_NHP) if rotation is None else (rotation.cos_ND, rotation.sin_ND)
        _join_kernel[(rows, -(-heads // 32))](
            nope_NHP, rope_NHD, cos, sin, out_NHK, rows, heads, *nope_NHP.stride()[:2], *rope_NHD.stride()[:2], P=nope,
            D=rope, HEADS=min(32, triton.next_power_of_2(heads)), BLOCK_P=triton.next_power_of_2(nope),
            BLOCK_D=triton.next_power_of_2(rope // 2), ROTATE=rotation is not None,
            INTERLEAVE=rotation is not None and rotation.interleave, INTERPRETED=INTERPRETED, num_warps=4,
        )  # fmt: skip
    return out_NHK


def join_reference(nope_NHP: Tensor, rope_NHD: Tensor, rotation: Rotation | None = None) -> Tensor:
    """The definition."""
    if rotation is not None:
        cos, sin = rotation.cos_ND.unsqueeze(1), rotation.sin_ND.unsqueeze(1)
        rope_NHD = rotate(rope_NHD, cos, sin, rotation.interleave)
    return torch.cat((nope_NHP, rope_NHD), dim=2)

"""Writing tokens into an FP8 latent cache: the bytes of `mla_cache.pack`, in one launch.

Floor, N tokens: 2 N C bytes read, N row_bytes(rank, rope) written; next to no arithmetic.

Shapes: N tokens, C = R + D values of a latent, P pages, G tokens a page, W bytes of a row; in the kernel K tiles of T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arguments import same_device, take
from teacher.kernels.mla_cache import TILE, row_bytes


def append(cache_PGW: Tensor, place_N: Tensor, latent_NC: Tensor, rank: int) -> None:
    """Write tokens' rows to their places (page * G + offset; each at most once, but for place 0, which nobody reads).

    Raises ValueError for tensors that it cannot take.
    """
    rope = latent_NC.shape[-1] - rank
    if cache_PGW.dtype != torch.uint8 or cache_PGW.shape[-1] != row_bytes(rank, rope) or not cache_PGW.is_contiguous():
        raise ValueError(
            f"append to a {cache_PGW.dtype} cache of shape {tuple(cache_PGW.shape)}; expected contiguous uint8, "
            f"{row_bytes(rank, rope)} a row"
        )
    take("latents", latent_NC, (torch.bfloat16, torch.float32), (2,))
    take("places", place_N, (torch.int32, torch.int64), (1,), contiguous=True)
    same_device(cache=cache_PGW, places=place_N, latents=latent_NC)
    if place_N.shape != latent_NC.shape[:1]:
        raise ValueError(f"latents are {list(latent_NC.shape)}, places {list(place_N.shape)}; taken: a place a latent")
    if latent_NC.shape[0] == 0:
        return
    _append[(latent_NC.shape[0],)](
        cache_PGW, cache_PGW.view(torch.float32), cache_PGW.view(torch.bfloat16), place_N, latent_NC,
        latent_NC.stride(0), RANK=rank, ROPE=rope, TILES=triton.next_power_of_2(-(-rank // TILE)), TILE=TILE,
        BLOCK_D=triton.next_power_of_2(rope), WIDTH=cache_PGW.shape[-1], num_warps=4,
    )  # fmt: skip


@triton.jit
def _append(
    codes, scales, ropes, place_N, latent_NC, stride_n,
    RANK: tl.constexpr, ROPE: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A program a token: all its tiles at once."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(place_N + token).to(tl.int64)
    tile_K = tl.arange(0, TILES)
    column_KT = tile_K[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x_KT = tl.load(latent_NC + token * stride_n + column_KT, mask=column_KT < RANK, other=0.0).to(tl.float32)
    amax_K = tl.max(tl.abs(x_KT), 1)
    scale_K = tl.where(amax_K == 0.0, 1.0, tl.maximum(tl.math.div_rn(amax_K, 448.0), 1.1754943508222875e-38))
    code_KT = to_e4m3(tl.math.div_rn(x_KT, tl.broadcast_to(scale_K[:, None], x_KT.shape)))
    tl.store(codes + place * WIDTH + column_KT, code_KT, mask=column_KT < RANK)
    used: tl.constexpr = (RANK + TILE - 1) // TILE
    tl.store(scales + place * (WIDTH // 4) + RANK // 4 + tile_K, scale_K, mask=tile_K < used)
    at_D = tl.arange(0, BLOCK_D)
    rope_D = tl.load(latent_NC + token * stride_n + RANK + at_D, mask=at_D < ROPE)
    tl.store(ropes + place * (WIDTH // 2) + RANK // 2 + 2 * used + at_D, rope_D.to(tl.bfloat16), mask=at_D < ROPE)


@triton.jit
def to_e4m3(x):
    """e4m3 codes (uint8) of fp32 values, nearest even, clamped to 448; the interpreter's own cast is wrong.

    Normal numbers: round the 20 low bits of the mantissa off, and shift the exponent's bias from 127 to 7. Subnormal
    ones: 2^14 has a last place of 2^-9, e4m3's step there, so adding it leaves the code in the low bits.
    """
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    raw = size.to(tl.uint32, bitcast=True)
    normal = ((raw + 0x7FFFF + ((raw >> 20) & 1)) >> 20) - 960
    small = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | sign).to(tl.uint8)

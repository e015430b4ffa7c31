"""The FP8 form of a cached token, FlashMLA's: the latent in e4m3, a fp32 scale for each 128 values, the rotary key in bf16.

For DeepSeek-V3's 512 + 64 values: 512 B + 4 x 4 B + 64 x 2 B = 656 B a token a layer, against 1,152 in bf16. The rotary
key keeps its precision: its error would grow with the position's rotation, and it is a tenth of the entry's values.
https://github.com/deepseek-ai/FlashMLA (README, "FP8 KV cache").

`pack` and `unpack` are the definition, in torch, on any device; `append` is the kernel, which writes the same bytes.
Floor of `append`, N tokens: 2 N C bytes read, N row_bytes(rank, rope) written; next to no arithmetic.

Shapes: N tokens, R = kv_lora_rank, D = qk_rope_head_dim, C = R + D, K = ceil(R / 128) scales, W = bytes of a row,
P pages, G tokens a page.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from teacher.fp8 import FP8, FP8_MAX, decode

TILE = 128


def row_bytes(rank: int, rope: int) -> int:
    """Bytes of a token's row. Raises ValueError where the parts would not be aligned to their sizes."""
    if rank % 4 or rope % 2:
        raise ValueError(
            f"an FP8 cache wants kv_lora_rank % 4 == 0 and qk_rope_head_dim % 2 == 0, not {rank} and {rope}"
        )
    return rank + 4 * -(-rank // TILE) + 2 * rope


def pack(latent_NC: Tensor, rank: int) -> Tensor:
    """Rows (…, W) of uint8 for latents (…, C): round to nearest even, scale = amax / 448, 1 for a tile of zeros."""
    values_NR, rope_ND = latent_NC.float().split((rank, latent_NC.shape[-1] - rank), dim=-1)
    tiles = -(-rank // TILE)
    tiles_NKT = F.pad(values_NR, (0, tiles * TILE - rank)).unflatten(-1, (tiles, TILE))
    amax_NK = tiles_NKT.abs().amax(-1)
    # Below fp32's smallest normal number a GPU's division may differ.
    scale_NK = torch.where(amax_NK == 0, 1.0, (amax_NK / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny))
    codes_NR = (tiles_NKT / scale_NK.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).flatten(-2)[..., :rank].to(FP8)
    parts = codes_NR, scale_NK, rope_ND.to(torch.bfloat16)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack(rows_NW: Tensor, rank: int, rope: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Latents (…, C) of rows (…, W)."""
    tiles = -(-rank // TILE)
    codes_NR, scale_NB, rope_NB = rows_NW.split((rank, 4 * tiles, 2 * rope), dim=-1)
    scale_NK = scale_NB.contiguous().view(torch.float32)
    values_NR = decode(codes_NR.contiguous().view(FP8)) * scale_NK.repeat_interleave(TILE, dim=-1)[..., :rank]
    return torch.cat((values_NR.to(dtype), rope_NB.contiguous().view(torch.bfloat16).to(dtype)), dim=-1)


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
    if latent_NC.dim() != 2 or latent_NC.stride(-1) != 1 or place_N.shape != latent_NC.shape[:1]:
        raise ValueError(
            f"append takes latents (N, C) and places (N,), not {tuple(latent_NC.shape)} and {tuple(place_N.shape)}"
        )
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
    """e4m3 codes (uint8) of fp32 values, nearest even, clamped to 448; written out, since the interpreter's cast is wrong.

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

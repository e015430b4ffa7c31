"""A cached token in FP8, FlashMLA's way: latent in e4m3, a fp32 scale for each 128 values, rotary key in bf16.

For DeepSeek-V3's 512 + 64 values: 512 B + 4 x 4 B + 64 x 2 B = 656 B a token a layer, against 1,152 in bf16. The rotary
key, a ninth of the values, keeps its precision.
https://github.com/deepseek-ai/FlashMLA (README, "FP8 KV cache").

Plain torch, on any device: the definition. The kernel that writes the same bytes is mla_append.py.

Shapes: N tokens, R = kv_lora_rank, D = qk_rope_head_dim, C = R + D, K = ceil(R / 128) scales, W = bytes of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    # By a tensor: on a GPU torch divides by a number by multiplying by its reciprocal, which rounds otherwise. Below
    # fp32's smallest normal number a GPU's division may differ too.
    scale_NK = (amax_NK / amax_NK.new_tensor(FP8_MAX)).clamp_min(torch.finfo(torch.float32).tiny)
    scale_NK = torch.where(amax_NK == 0, 1.0, scale_NK)
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

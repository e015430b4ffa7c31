"""MLA decode in plain torch: the definition that the kernel is tested against, and what runs where it cannot.

Shapes: see mla_decode.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.kernels.mla_cache import unpack


def mla_decode_reference(
    q_latent_BTHR: Tensor, q_rope_BTHD: Tensor, cache_PGW: Tensor, table_BP: Tensor, position_BT: Tensor, scale: float,
    first_B: Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Attended latents (B, T, H, R) in `dtype`, computed in it; arguments as of `mla_decode`."""
    rank, rope = q_latent_BTHR.shape[-1], q_rope_BTHD.shape[-1]
    size = cache_PGW.shape[1]
    at_S = torch.arange(table_BP.shape[1] * size, device=cache_PGW.device)
    seen_BTS = at_S <= position_BT.unsqueeze(-1)
    if first_B is not None:
        seen_BTS &= at_S >= first_B[:, None, None]
    rows_BSW = cache_PGW[table_BP.long()].flatten(1, 2)
    if cache_PGW.dtype == torch.uint8:
        rows_BSC = unpack(rows_BSW, rank, rope, dtype)
    else:
        rows_BSC = rows_BSW.to(dtype)
    # 0 times what nobody wrote may be NaN.
    rows_BSC = rows_BSC.masked_fill(~seen_BTS.any(1).unsqueeze(-1), 0.0)
    query_BTHC = torch.cat((q_latent_BTHR, q_rope_BTHD), dim=-1).to(dtype)
    scores_BTHS = torch.einsum("bthc,bsc->bths", query_BTHC, rows_BSC) * scale
    scores_BTHS = scores_BTHS.masked_fill(~seen_BTS.unsqueeze(2), float("-inf"))
    weights_BTHS = scores_BTHS.softmax(-1).nan_to_num(0.0)  # a query that sees nothing
    return torch.einsum("bths,bsr->bthr", weights_BTHS, rows_BSC[..., :rank])

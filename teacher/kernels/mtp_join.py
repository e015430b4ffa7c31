"""What the draft module's first projection reads, in one launch: the next token's embedding and the hidden state, each
normalised, side by side (DeepSeek-V3 eq. 21). Four operators of torch otherwise. Floor, a token: 8 H bytes.

Shapes: N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arguments import INTERPRETED, same_device, take
from teacher.kernels.rms_norm import to_bf16
from teacher.norm import RMSNorm


@triton.jit
def _join_kernel(
    tokens, embedding, hidden, e_weight, h_weight, out, H, e_eps, h_eps, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program (token, 0) does the embedding, (token, 1) the hidden state."""
    row = tl.program_id(0).to(tl.int64)
    at_H = tl.arange(0, BLOCK)
    live_H = at_H < H
    if tl.program_id(1) == 0:
        x_H = tl.load(embedding + tl.load(tokens + row) * H + at_H, mask=live_H, other=0.0).to(tl.float32)
        weight_H = tl.load(e_weight + at_H, mask=live_H, other=0.0).to(tl.float32)
        y_H = x_H * tl.rsqrt(tl.sum(x_H * x_H, axis=0) / H + e_eps) * weight_H
        tl.store(out + row * 2 * H + at_H, to_bf16(y_H, INTERPRETED), mask=live_H)
    else:
        x_H = tl.load(hidden + row * H + at_H, mask=live_H, other=0.0).to(tl.float32)
        weight_H = tl.load(h_weight + at_H, mask=live_H, other=0.0).to(tl.float32)
        y_H = x_H * tl.rsqrt(tl.sum(x_H * x_H, axis=0) / H + h_eps) * weight_H
        tl.store(out + row * 2 * H + H + at_H, to_bf16(y_H, INTERPRETED), mask=live_H)


def mtp_join(tokens_N: Tensor, embedding_VH: Tensor, hidden_NH: Tensor, enorm: RMSNorm, hnorm: RMSNorm) -> Tensor:
    """(N, 2 H) in bf16: enorm of each token's embedding, then hnorm of its hidden state."""
    take("tokens_N", tokens_N, (torch.int64,), (1,), contiguous=True)
    take("embedding_VH", embedding_VH, (torch.bfloat16,), (2,), contiguous=True)
    take("hidden_NH", hidden_NH, (torch.bfloat16,), (2,), contiguous=True)
    same_device(tokens_N=tokens_N, embedding_VH=embedding_VH, hidden_NH=hidden_NH)
    count, size = hidden_NH.shape
    if len(tokens_N) != count or embedding_VH.shape[1] != size:
        found = f"{len(tokens_N)} tokens with embeddings of {embedding_VH.shape[1]}"
        raise ValueError(f"{found}, hidden states {count} x {size}; taken: one of each, of one size")
    out_NX = torch.empty(count, 2 * size, dtype=torch.bfloat16, device=hidden_NH.device)
    if count:
        block = triton.next_power_of_2(size)
        _join_kernel[(count, 2)](
            tokens_N, embedding_VH, hidden_NH, enorm.weight, hnorm.weight, out_NX, size, enorm.eps, hnorm.eps,
            BLOCK=block, INTERPRETED=INTERPRETED, num_warps=min(8, max(1, block // 256)),
        )  # fmt: skip
    return out_NX


def mtp_join_reference(
    tokens_N: Tensor, embedding_VH: Tensor, hidden_NH: Tensor, enorm: RMSNorm, hnorm: RMSNorm
) -> Tensor:
    """The definition."""
    return torch.cat((enorm(embedding_VH[tokens_N]), hnorm(hidden_NH)), dim=-1)

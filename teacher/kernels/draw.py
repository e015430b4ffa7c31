"""`teacher.sampling.sample_likely` in two launches around torch's top-k, where operators of torch are a hundred.

The first kernel reads the logits once, a part of a row a program: its largest value and where it stands, and the sum of
exponentials (a softmax over 100,000 logits by one block takes 80 us, as long as reading the output layer). The second,
a program a row, makes probabilities of the likeliest logits, applies the limits and draws with the request's own
number. Floor, a row: 2 V bytes.

Shapes: B rows, V vocabulary, K candidates, S parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arguments import same_device, take
from teacher.sampling import CANDIDATES, Settings

_PART = 4096


@triton.jit
def _parts_kernel(logits, temperature, largest, index, total, V, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    scale = tl.maximum(tl.load(temperature + row), 1e-6)
    tl.store(largest + row * PARTS + part, top)
    tl.store(index + row * PARTS + part, tl.min(tl.where(x == top, column, V), axis=0))
    # Scaled before the difference, as a softmax of scaled logits has it.
    tl.store(total + row * PARTS + part, tl.sum(tl.exp(x / scale - top / scale), axis=0))


@triton.jit
def _mixed(x):
    """splitmix64's finaliser."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _draw_kernel(
    values, tokens, largest, index, total, temperature, top_p, top_k, min_p, seed, counter, drawn, sure, V,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, BLOCK_S: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """WHOLE: the candidates are the vocabulary."""
    row = tl.program_id(0)
    part_S = tl.arange(0, BLOCK_S)
    own_S = part_S < PARTS
    scale = tl.maximum(tl.load(temperature + row), 1e-6)
    top_S = tl.load(largest + row * PARTS + part_S, mask=own_S, other=float("-inf"))
    top = tl.max(top_S, axis=0)
    index_S = tl.load(index + row * PARTS + part_S, mask=own_S, other=V)
    greedy = tl.min(tl.where(top_S == top, index_S, V), axis=0)
    sum_S = tl.load(total + row * PARTS + part_S, mask=own_S, other=0.0)
    whole = tl.sum(sum_S * tl.exp(top_S / scale - top / scale), axis=0)

    rank_K = tl.arange(0, BLOCK_K)
    value_K = tl.load(values + row * K + rank_K, mask=rank_K < K, other=float("-inf")).to(tl.float32)
    p_K = tl.exp(value_K / scale - top / scale) / whole
    limit_k, limit_p, least_p = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    first = tl.max(p_K, axis=0)
    kept_K = ((rank_K < limit_k) | (limit_k == 0)) & (p_K >= least_p * first) & (rank_K < K)
    left = tl.where((limit_k > 0) | (least_p > 0.0), tl.sum(tl.where(kept_K, p_K, 0.0), axis=0), 1.0)
    before_K = tl.cumsum(p_K, axis=0) - p_K
    kept_K = kept_K & ((before_K < limit_p * left) | (rank_K == 0))
    share_K = tl.cumsum(tl.where(kept_K, p_K, 0.0).to(tl.float64), axis=0)
    end = tl.max(share_K, axis=0)
    bits = _mixed(tl.load(seed + row).to(tl.uint64)) ^ (tl.load(counter + row).to(tl.uint64) * 0x9E3779B97F4A7C15)
    number = (_mixed(bits) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)
    chosen = tl.sum(((share_K <= number * end) & (rank_K < K)).to(tl.int32), axis=0)
    chosen = tl.minimum(chosen, tl.sum(kept_K.to(tl.int32), axis=0) - 1)
    token_K = tl.load(tokens + row * K + rank_K, mask=rank_K < K, other=0)
    token = tl.sum(tl.where(rank_K == chosen, token_K, 0), axis=0)
    warm = tl.load(temperature + row) > 0.0
    tl.store(drawn + row, tl.where(warm, token, greedy.to(tl.int64)))
    enough = (limit_k > 0) & (limit_k <= K)
    enough = enough | ((limit_k == 0) & (least_p == 0.0) & (tl.sum(p_K, axis=0) > limit_p))
    enough = enough | (tl.min(tl.where(rank_K < K, p_K, 1.0), axis=0) < least_p * first)
    enough = enough | (not warm)
    if WHOLE:
        enough = enough | True
    tl.store(sure + row, enough.to(tl.int64))


def draw_likely(logits_BV: Tensor, settings: Settings, counter_B: Tensor, out_2B: Tensor | None = None) -> Tensor:
    """The next token of each row, and where the likeliest were enough to be sure (1 or 0): int64 (2, B)."""
    take("logits_BV", logits_BV, (torch.bfloat16, torch.float32), (2,), contiguous=True)
    for name, each, dtype in (
        ("temperature_B", settings.temperature_B, torch.float32), ("top_p_B", settings.top_p_B, torch.float32),
        ("min_p_B", settings.min_p_B, torch.float32), ("top_k_B", settings.top_k_B, torch.int64),
        ("seed_B", settings.seed_B, torch.int64), ("counter_B", counter_B, torch.int64),
    ):  # fmt: skip
        take(name, each, (dtype,), (1,), contiguous=True)
        same_device(logits_BV=logits_BV, **{name: each})
    (rows, vocabulary), device = logits_BV.shape, logits_BV.device
    whole = vocabulary <= 2 * CANDIDATES
    values_BK, tokens_BK = logits_BV.topk(vocabulary if whole else CANDIDATES, dim=-1)
    k, parts = values_BK.shape[1], -(-vocabulary // _PART)
    largest_BS, total_BS = torch.empty(2, rows, parts, dtype=torch.float32, device=device)
    index_BS = torch.empty(rows, parts, dtype=torch.int32, device=device)
    if out_2B is None:
        out_2B = torch.empty(2, rows, dtype=torch.int64, device=device)
    take("out_2B", out_2B, (torch.int64,), (2,), contiguous=True)
    drawn_B, sure_B = out_2B
    _parts_kernel[(rows, parts)](
        logits_BV, settings.temperature_B, largest_BS, index_BS, total_BS, vocabulary, PARTS=parts, BLOCK=_PART,
        num_warps=8,
    )  # fmt: skip
    _draw_kernel[(rows,)](
        values_BK, tokens_BK, largest_BS, index_BS, total_BS, settings.temperature_B, settings.top_p_B,
        settings.top_k_B, settings.min_p_B, settings.seed_B, counter_B, drawn_B, sure_B, vocabulary, K=k,
        BLOCK_K=triton.next_power_of_2(k), PARTS=parts, BLOCK_S=triton.next_power_of_2(parts), WHOLE=whole,
        num_warps=2,
    )  # fmt: skip
    return out_2B

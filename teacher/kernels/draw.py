"""`teacher.sampling.sample_likely` by kernels, where operators of torch are a hundred.

A small vocabulary takes one launch: a program a row sorts all of it, so that every draw is sure, with equal logits in
the order of their ids, as in a stable sort. A large one takes two around torch's top-k. The first kernel reads the
logits once, a part of a row a program: its largest value and where it stands, and the sum of exponentials (a softmax
over 100,000 logits by one block takes 80 us, as long as reading the output layer). The second, a program a row, makes
probabilities of the likeliest logits, applies the limits and draws with the request's own number. Floor, a row: 2 V
bytes.

Shapes: B rows, V vocabulary, K candidates, S parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.kernels.arguments import INTERPRETED, same_device, take
from teacher.sampling import CANDIDATES, Settings

_PART = 4096
WHOLE = 1024  # the largest vocabulary that one program sorts


@triton.jit
def _parts_kernel(
    logits, temperature, largest, index, total, V, PARTS: tl.constexpr, BLOCK: tl.constexpr, REPEAT: tl.constexpr
):
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    scale = tl.maximum(tl.load(temperature + row // REPEAT), 1e-6)
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
def _number(seed, counter):
    """u(seed, counter) in [0, 1); see teacher.sampling.uniform."""
    bits = _mixed(seed.to(tl.uint64)) ^ (counter.to(tl.uint64) * 0x9E3779B97F4A7C15)
    return (_mixed(bits) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _ranked(x, at):
    """Values and their places as one int64 each, which sorts by value and then by the lower place."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)


@triton.jit
def _sorted(keys, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Keys, no two alike, in descending order. Interpreted, a sort takes seconds: there each goes to its rank."""
    if INTERPRETED:
        rank_V = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), axis=1)
        found_VV = rank_V[None, :] == tl.arange(0, BLOCK)[:, None]
        return tl.sum(tl.where(found_VV, keys[None, :], 0), axis=1)
    return tl.sort(keys, descending=True)


@triton.jit(do_not_specialize=["offset"])
def _whole_kernel(
    logits, temperature, top_p, top_k, min_p, seed, counter, drawn, sure, V, offset,
    BLOCK: tl.constexpr, REPEAT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    own = row // REPEAT
    rank_V = tl.arange(0, BLOCK)
    x_V = tl.load(logits + row.to(tl.int64) * V + rank_V, mask=rank_V < V, other=float("-inf")).to(tl.float32)
    key_V = _sorted(_ranked(x_V, rank_V), BLOCK, INTERPRETED)
    token_V = 0x7FFFFFFF - (key_V & 0x7FFFFFFF).to(tl.int32)
    bits_V = (key_V >> 32).to(tl.int32)
    x_V = tl.where(bits_V < 0, bits_V ^ 0x7FFFFFFF, bits_V).to(tl.float32, bitcast=True)
    real_V = token_V < V
    warm = tl.load(temperature + own) > 0.0
    scale = tl.maximum(tl.load(temperature + own), 1e-6)
    p_V = tl.exp(x_V / scale - tl.max(x_V, axis=0) / scale)
    p_V = p_V / tl.sum(p_V, axis=0)
    limit_k, limit_p, least_p = tl.load(top_k + own), tl.load(top_p + own), tl.load(min_p + own)
    kept_V = ((rank_V < limit_k) | (limit_k == 0)) & (p_V >= least_p * tl.max(p_V, axis=0)) & real_V
    left = tl.where((limit_k > 0) | (least_p > 0.0), tl.sum(tl.where(kept_V, p_V, 0.0), axis=0), 1.0)
    before_V = tl.cumsum(p_V, axis=0) - p_V
    kept_V = kept_V & ((before_V < limit_p * left) | (rank_V == 0))
    share_V = tl.cumsum(tl.where(kept_V, p_V, 0.0).to(tl.float64), axis=0)
    number = _number(tl.load(seed + own), tl.load(counter + own) + row % REPEAT + offset)
    passed_V = (share_V <= number * tl.max(share_V, axis=0)) & real_V
    # The last kept token bounds the search: rounding must not land on one that was dropped.
    chosen = tl.minimum(tl.sum(passed_V.to(tl.int32), axis=0), tl.max(tl.where(kept_V, rank_V, 0), axis=0))
    chosen = tl.where(warm, chosen, 0)
    tl.store(drawn + row, tl.sum(tl.where(rank_V == chosen, token_V, 0), axis=0).to(tl.int64))
    tl.store(sure + row, 1)


@triton.jit(do_not_specialize=["offset"])
def _draw_kernel(
    values, tokens, largest, index, total, temperature, top_p, top_k, min_p, seed, counter, drawn, sure, V, offset,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, BLOCK_S: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    own = row // REPEAT
    part_S = tl.arange(0, BLOCK_S)
    own_S = part_S < PARTS
    scale = tl.maximum(tl.load(temperature + own), 1e-6)
    top_S = tl.load(largest + row * PARTS + part_S, mask=own_S, other=float("-inf"))
    top = tl.max(top_S, axis=0)
    index_S = tl.load(index + row * PARTS + part_S, mask=own_S, other=V)
    greedy = tl.min(tl.where(top_S == top, index_S, V), axis=0)
    sum_S = tl.load(total + row * PARTS + part_S, mask=own_S, other=0.0)
    whole = tl.sum(sum_S * tl.exp(top_S / scale - top / scale), axis=0)

    rank_K = tl.arange(0, BLOCK_K)
    value_K = tl.load(values + row * K + rank_K, mask=rank_K < K, other=float("-inf")).to(tl.float32)
    p_K = tl.exp(value_K / scale - top / scale) / whole
    limit_k, limit_p, least_p = tl.load(top_k + own), tl.load(top_p + own), tl.load(min_p + own)
    first = tl.max(p_K, axis=0)
    kept_K = ((rank_K < limit_k) | (limit_k == 0)) & (p_K >= least_p * first) & (rank_K < K)
    left = tl.where((limit_k > 0) | (least_p > 0.0), tl.sum(tl.where(kept_K, p_K, 0.0), axis=0), 1.0)
    before_K = tl.cumsum(p_K, axis=0) - p_K
    kept_K = kept_K & ((before_K < limit_p * left) | (rank_K == 0))
    share_K = tl.cumsum(tl.where(kept_K, p_K, 0.0).to(tl.float64), axis=0)
    end = tl.max(share_K, axis=0)
    number = _number(tl.load(seed + own), tl.load(counter + own) + row % REPEAT + offset)
    chosen = tl.sum(((share_K <= number * end) & (rank_K < K)).to(tl.int32), axis=0)
    chosen = tl.minimum(chosen, tl.sum(kept_K.to(tl.int32), axis=0) - 1)
    token_K = tl.load(tokens + row * K + rank_K, mask=rank_K < K, other=0)
    token = tl.sum(tl.where(rank_K == chosen, token_K, 0), axis=0)
    warm = tl.load(temperature + own) > 0.0
    tl.store(drawn + row, tl.where(warm, token, greedy.to(tl.int64)))
    enough = (limit_k > 0) & (limit_k <= K)
    enough = enough | ((limit_k == 0) & (least_p == 0.0) & (tl.sum(p_K, axis=0) > limit_p))
    enough = enough | (tl.min(tl.where(rank_K < K, p_K, 1.0), axis=0) < least_p * first)
    enough = enough | (not warm)
    tl.store(sure + row, enough.to(tl.int64))


def draw_likely(
    logits_BV: Tensor, settings: Settings, counter_B: Tensor, out_2B: Tensor | None = None, repeat: int = 1,
    offset: int = 0,
) -> Tensor:  # fmt: skip
    """The next token of each row, and where the likeliest were enough to be sure (1 or 0): int64 (2, B).

    With `repeat` settings and counters are of so many rows each, whose counters go up by one; `offset` is added to all.
    """
    take("logits_BV", logits_BV, (torch.bfloat16, torch.float32), (2,), contiguous=True)
    (rows, vocabulary), device = logits_BV.shape, logits_BV.device
    for name, each, dtype in (
        ("temperature_B", settings.temperature_B, torch.float32), ("top_p_B", settings.top_p_B, torch.float32),
        ("min_p_B", settings.min_p_B, torch.float32), ("top_k_B", settings.top_k_B, torch.int64),
        ("seed_B", settings.seed_B, torch.int64), ("counter_B", counter_B, torch.int64),
    ):  # fmt: skip
        take(name, each, (dtype,), (1,), contiguous=True)
        same_device(logits_BV=logits_BV, **{name: each})
        if len(each) * repeat != rows:
            raise ValueError(f"{name} has {len(each)} values for {rows} rows; taken: one for {repeat} of them")
    if out_2B is None:
        out_2B = torch.empty(2, rows, dtype=torch.int64, device=device)
    take("out_2B", out_2B, (torch.int64,), (2,), contiguous=True)
    drawn_B, sure_B = out_2B
    how = (
        settings.temperature_B, settings.top_p_B, settings.top_k_B, settings.min_p_B, settings.seed_B, counter_B,
        drawn_B, sure_B, vocabulary, offset,
    )  # fmt: skip
    if vocabulary <= WHOLE:
        _whole_kernel[(rows,)](
            logits_BV, *how, BLOCK=triton.next_power_of_2(vocabulary), REPEAT=repeat, INTERPRETED=INTERPRETED,
            num_warps=4,
        )  # fmt: skip
        return out_2B
    values_BK, tokens_BK = logits_BV.topk(CANDIDATES, dim=-1)
    parts = -(-vocabulary // _PART)
    largest_BS, total_BS = torch.empty(2, rows, parts, dtype=torch.float32, device=device)
    index_BS = torch.empty(rows, parts, dtype=torch.int32, device=device)
    _parts_kernel[(rows, parts)](
        logits_BV, settings.temperature_B, largest_BS, index_BS, total_BS, vocabulary, PARTS=parts, BLOCK=_PART,
        REPEAT=repeat, num_warps=8,
    )  # fmt: skip
    _draw_kernel[(rows,)](
        values_BK, tokens_BK, largest_BS, index_BS, total_BS, *how, K=CANDIDATES, BLOCK_K=CANDIDATES, PARTS=parts,
        BLOCK_S=triton.next_power_of_2(parts), REPEAT=repeat, num_warps=2,
    )  # fmt: skip
    return out_2B

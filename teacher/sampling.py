"""Drawing the next token: temperature, top-k, top-p, and randomness that belongs to the request, not to the batch.

The draw for a request's n-th token is a function of (seed, n) alone, by a counter-based generator (splitmix64's
finaliser), so a request gives the same text whatever else is in the batch, and after a restart.

Shapes: B rows, V vocabulary, K kept candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Candidates sorted at first. top-p of a trained model rarely needs more; rows that do make the whole batch sort all.
_CANDIDATES = 64


def uniform(seed_B: Tensor, counter_B: Tensor) -> Tensor:
    """A float64 in [0, 1) for each (seed, counter) pair of int64s; 53 random bits."""
    mixed = _mix(seed_B.long()) ^ (counter_B.long() * -7046029254386353131)  # 2^64 / golden ratio, as int64
    return _shift(_mix(mixed), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 arithmetic wraps, which is what is wanted."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sample(
    logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, top_k_B: Tensor, seed_B: Tensor, counter_B: Tensor
) -> Tensor:
    """The next token of each row, int64 (B,).

    temperature 0 takes the most likely token. top_k 0 keeps all; top_p keeps the smallest set of most likely tokens
    whose probability reaches it. As in vLLM and transformers, temperature is applied first, then top-k, then top-p.
    The token is the one in whose share of the cumulative probability, by descending probability, the draw falls.
    """
    greedy_B = logits_BV.argmax(-1)
    if not bool((temperature_B > 0).any()):
        return greedy_B
    probs_BV = (logits_BV.float() / temperature_B.clamp_min(1e-6).unsqueeze(-1)).softmax(-1)
    sorted_BK, tokens_BK = _most_likely(probs_BV, top_p_B, top_k_B)
    rank_K = torch.arange(sorted_BK.shape[-1], device=logits_BV.device)
    before_BK = sorted_BK.cumsum(-1) - sorted_BK
    kept_BK = (rank_K < top_k_B.unsqueeze(-1)) | (top_k_B.unsqueeze(-1) == 0)
    # top-p counts shares of what top-k left, which without top-k is 1 even where only the likeliest are at hand.
    left_B1 = torch.where(top_k_B > 0, (sorted_BK * kept_BK).sum(-1), 1.0).unsqueeze(-1)
    kept_BK &= (before_BK < top_p_B.unsqueeze(-1) * left_B1) | (rank_K == 0)
    cumulative_BK = (sorted_BK * kept_BK).double().cumsum(-1)
    draw_B1 = uniform(seed_B, counter_B).unsqueeze(-1) * cumulative_BK[:, -1:]
    # The last kept token bounds the search: rounding must not land on one that was dropped.
    chosen_B1 = torch.searchsorted(cumulative_BK, draw_B1, right=True)
    chosen_B1 = torch.minimum(chosen_B1, kept_BK.sum(-1, keepdim=True) - 1)
    sampled_B = tokens_BK.gather(-1, chosen_B1).squeeze(-1)
    return torch.where(temperature_B > 0, sampled_B, greedy_B)


def _most_likely(probs_BV: Tensor, top_p_B: Tensor, top_k_B: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, descending, with their tokens: as many as every row's top-k or top-p can reach, else all."""
    if probs_BV.shape[-1] > 2 * _CANDIDATES:
        # A partial sort is a third of a full one at 300 tokens, a twentieth at 32,000.
        sorted_BK, tokens_BK = probs_BV.topk(_CANDIDATES, dim=-1)
        enough_B = (sorted_BK.sum(-1) > top_p_B) | ((top_k_B > 0) & (top_k_B <= _CANDIDATES))
        if bool(enough_B.all()):
            return sorted_BK, tokens_BK
    return probs_BV.sort(dim=-1, descending=True, stable=True)

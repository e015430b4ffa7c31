"""Drawing the next token: temperature, top-k, top-p, and randomness that belongs to the request, not to the batch.

The draw for a request's n-th token is a function of (seed, n) alone, by a counter-based generator (splitmix64's
finaliser), so a request gives the same text whatever else is in the batch, and after a restart.

Shapes: B rows, V vocabulary, K kept candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Candidates sorted at first. top-p of a trained model rarely needs more; rows that do make the whole batch sort all.
CANDIDATES = 64


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


class Settings(NamedTuple):
    """How each row is sampled. temperature 0: the most likely token; top_k 0, top_p 1, min_p 0: no limit."""

    temperature_B: Tensor
    top_p_B: Tensor
    top_k_B: Tensor
    min_p_B: Tensor
    seed_B: Tensor


def sample(logits_BV: Tensor, settings: Settings, counter_B: Tensor) -> Tensor:
    """The next token of each row, int64 (B,); `counter_B` is how many tokens its request has drawn before.

    As in vLLM: temperature first; min-p keeps tokens at least that share as likely as the likeliest, top-k so many, and
    top-p the smallest set of the likeliest whose share of what the others left reaches it. The token is the one in
    whose share of the cumulative probability, by descending probability, the draw falls.
    """
    if not bool((settings.temperature_B > 0).any()):
        return logits_BV.argmax(-1)
    drawn_B, sure_B = sample_likely(logits_BV, settings, counter_B)
    if bool(sure_B.all()):
        return drawn_B
    ranked_BV, tokens_BV = _probabilities(logits_BV, settings).sort(dim=-1, descending=True, stable=True)
    return _draw(ranked_BV, tokens_BV, logits_BV, settings, counter_B)


def sample_likely(logits_BV: Tensor, settings: Settings, counter_B: Tensor) -> tuple[Tensor, Tensor]:
    """`sample` from the likeliest tokens alone, and where these are enough to be sure (bool, (B,)).

    Asks the host for nothing, so a CUDA graph can hold it.
    """
    sorted_BK, tokens_BK, sure_B = _most_likely(logits_BV, settings)
    return _draw(sorted_BK, tokens_BK, logits_BV, settings, counter_B), sure_B


def _draw(sorted_BK: Tensor, tokens_BK: Tensor, logits_BV: Tensor, settings: Settings, counter_B: Tensor) -> Tensor:
    """One of the candidates, which come by descending probability; at temperature 0 the likeliest token."""
    temperature_B, top_p_B, top_k_B, min_p_B, seed_B = settings
    rank_K = torch.arange(sorted_BK.shape[-1], device=sorted_BK.device)
    kept_BK = (rank_K < top_k_B.unsqueeze(-1)) | (top_k_B.unsqueeze(-1) == 0)
    kept_BK &= sorted_BK >= min_p_B.unsqueeze(-1) * sorted_BK[:, :1]
    # Without top-k and min-p all of the probability is left, even where only the likeliest tokens are at hand.
    limited_B = (top_k_B > 0) | (min_p_B > 0)
    left_B1 = torch.where(limited_B, (sorted_BK * kept_BK).sum(-1), 1.0).unsqueeze(-1)
    before_BK = sorted_BK.cumsum(-1) - sorted_BK
    kept_BK &= (before_BK < top_p_B.unsqueeze(-1) * left_B1) | (rank_K == 0)
    cumulative_BK = (sorted_BK * kept_BK).double().cumsum(-1)
    draw_B1 = uniform(seed_B, counter_B).unsqueeze(-1) * cumulative_BK[:, -1:]
    # The last kept token bounds the search: rounding must not land on one that was dropped.
    chosen_B1 = torch.searchsorted(cumulative_BK, draw_B1, right=True)
    chosen_B1 = torch.minimum(chosen_B1, kept_BK.sum(-1, keepdim=True) - 1)
    sampled_B = tokens_BK.gather(-1, chosen_B1).squeeze(-1)
    return torch.where(temperature_B > 0, sampled_B, logits_BV.argmax(-1))


def _probabilities(logits_BV: Tensor, settings: Settings) -> Tensor:
    return (logits_BV.float() / settings.temperature_B.clamp_min(1e-6).unsqueeze(-1)).softmax(-1)


def _most_likely(logits_BV: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The largest probabilities, descending, their tokens, and in which rows no limit can reach further."""
    probs_BV = _probabilities(logits_BV, settings)
    if probs_BV.shape[-1] <= 2 * CANDIDATES:
        return *probs_BV.sort(dim=-1, descending=True, stable=True), torch.ones_like(settings.seed_B, dtype=torch.bool)
    # A partial sort is a third of a full one at 300 tokens, a twentieth at 32,000.
    sorted_BK, tokens_BK = probs_BV.topk(CANDIDATES, dim=-1)
    enough_B = (settings.top_k_B > 0) & (settings.top_k_B <= CANDIDATES)
    enough_B |= (settings.top_k_B == 0) & (settings.min_p_B == 0) & (sorted_BK.sum(-1) > settings.top_p_B)
    enough_B |= sorted_BK[:, -1] < settings.min_p_B * sorted_BK[:, 0]
    return sorted_BK, tokens_BK, enough_B | (settings.temperature_B <= 0)

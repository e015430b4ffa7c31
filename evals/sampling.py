"""Drawing the next token of many sequences at once, each from its own stream of random numbers.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed from whatever identifies a sample, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _mix(value_B: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    value_B = (value_B ^ (value_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_B = (value_B ^ (value_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_B ^ (value_B >> np.uint64(31))


def uniforms(seed_B: np.ndarray, step_B: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) with 24 bits, float32: a function of (seed, step) alone, both uint64.

    A counter instead of a generator's state, so that a token depends on its own sequence and never on which
    others shared the batch.
    """
    bits_B = _mix(_mix(seed_B + _GOLDEN) + (step_B + np.uint64(1)) * _GOLDEN) >> np.uint64(40)
    return bits_B.astype(np.float32) * np.float32(2.0**-24)


def draw(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor, top_p_B: torch.Tensor, uniform_B: torch.Tensor
) -> torch.Tensor:
    """Next tokens (B, int64): temperature, then the smallest set of most likely tokens that holds `top_p` (nucleus).

    Temperature 0 is greedy. The distribution is that of transformers' TemperatureLogitsWarper and TopPLogitsWarper.
    The draw inverts the cumulative distribution in vocabulary order, not in order of likelihood: rounding that
    swaps two nearly equal tokens then changes the draw in no more than a rounding's share of cases.
    """
    greedy_B = temperature_B <= 0
    scaled_BV = logits_BV.float() / torch.where(greedy_B, 1.0, temperature_B)[:, None]
    prob_BV = scaled_BV.softmax(-1)
    candidates = min(32, prob_BV.shape[1])
    least_B = _least_kept(prob_BV, top_p_B, candidates)
    if candidates < prob_BV.shape[1]:
        wide_B = least_B < 0  # so many tokens hold less than top_p
        if wide_B.any():
            least_B[wide_B] = _least_kept(prob_BV[wide_B], top_p_B[wide_B], prob_BV.shape[1])
    weight_BV = torch.where(prob_BV >= least_B[:, None], prob_BV, 0.0)
    cumulative_BV = weight_BV.cumsum(-1)
    # Just below the total, so that rounding never selects a token after the last one kept.
    target_B = uniform_B * cumulative_BV[:, -1] * (1 - 1e-6)
    drawn_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    return torch.where(greedy_B, logits_BV.argmax(-1), drawn_B)


def _least_kept(prob_BV: torch.Tensor, top_p_B: torch.Tensor, candidates: int) -> torch.Tensor:
    """Probability of the least likely token of each nucleus; -1 where `candidates` tokens do not hold top_p."""
    top_BC = prob_BV.topk(candidates, dim=-1).values if candidates < prob_BV.shape[1] else prob_BV.sort(-1, True).values
    before_BC = top_BC.cumsum(-1) - top_BC
    kept_B = (before_BC < top_p_B[:, None]).sum(-1)
    least_B = top_BC.gather(1, (kept_B - 1).clamp(min=0)[:, None])[:, 0]
    if candidates < prob_BV.shape[1]:
        short_B = before_BC[:, -1] + top_BC[:, -1] < top_p_B
        least_B = torch.where(short_B, -1.0, least_B)
    return least_B

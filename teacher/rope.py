"""Rotary position embedding with YaRN's frequencies, as DeepSeek-V3 uses it on the decoupled part of queries and keys.

RoPE: arXiv 2104.09864. YaRN: arXiv 2309.00071. Decoupled RoPE: DeepSeek-V2 section 2.1.3.

Shapes: B batch, T tokens, D = qk_rope_head_dim, `...` any middle dimensions (heads).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teacher.config import DeepseekV3Config


def inverse_frequencies(config: DeepseekV3Config) -> Tensor:
    """Radians a position for each of the D/2 rotated pairs, fp32.

    YaRN interpolates slow pairs (fewer than `beta_slow` turns over the original context) by `factor`, keeps fast ones
    (more than `beta_fast` turns), and blends linearly between (2309.00071 section 3.2).
    """
    dim = config.qk_rope_head_dim
    fast = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    rope = config.rope_scaling
    if rope is None:
        return fast

    def pair_with(turns: float) -> float:
        context = rope["original_max_position_embeddings"]
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_with(rope.get("beta_fast") or 32), pair_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return fast * (1 - interpolated) + fast / rope["factor"] * interpolated


def softmax_scale(config: DeepseekV3Config) -> float:
    """What attention scores are multiplied by: 1/sqrt(qk_head_dim), times YaRN's mscale squared."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None and config.rope_scaling.get("mscale_all_dim"):
        scale *= _mscale(config.rope_scaling["factor"], config.rope_scaling["mscale_all_dim"]) ** 2
    return scale


def rotation_scale(config: DeepseekV3Config) -> float:
    """What cos and sin are multiplied by; 1 for DeepSeek-V3, whose mscale equals its mscale_all_dim.

    As DeepSeek's own modelling code and vLLM: a missing `mscale` is 1, a missing `mscale_all_dim` 0. transformers
    (5.17, 5.19) differs when exactly one of the two is given: it then ignores both here.
    """
    rope = config.rope_scaling
    if rope is None:
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    mscale = 1.0 if rope.get("mscale") is None else rope["mscale"]
    return _mscale(rope["factor"], mscale) / _mscale(rope["factor"], rope.get("mscale_all_dim") or 0.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rotation_table(config: DeepseekV3Config, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (length, D/2), fp32."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(config))
    scale = rotation_scale(config)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """Rotate the pairs of the last dimension of `x` (..., D) by cos, sin broadcastable to (..., D/2).

    `interleave` says how pairs lie in `x`: (x0, x1), (x2, x3), … as in DeepSeek's weights, or first half with second
    half. The result always has first halves, then second halves: scores do not see the order as long as queries and
    keys agree, and the cache then has one layout. Computed in the dtype of cos (fp32), returned in that of `x`, as in
    DeepSeek's inference/model.py; transformers rounds cos and sin to the dtype of `x` first.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

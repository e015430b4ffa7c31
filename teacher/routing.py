"""Which experts see a token: sigmoid gating, group-limited top-k, and a selection bias that gets no gradient.

DeepSeek-V3 sections 2.1.2 (eq. 12-16) and 2.1.3; loss-free balance: arXiv 2408.15664.

Shapes: N tokens, E routed experts, G groups, K experts a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.config import DeepseekV3Config
from teacher.kernels.arguments import obstacle


class Routing(NamedTuple):
    """One MoE layer's decision for N tokens."""

    indices_NK: Tensor  # chosen experts, int64
    weights_NK: Tensor  # their weights, fp32, with gradient
    scores_NE: Tensor  # sigmoid affinities of all experts, fp32, with gradient (for the sequence-wise loss)


class Router(nn.Module):
    """The gate of one MoE layer. Scores are computed in fp32 whatever the model's dtype, as DeepSeek does."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        # A buffer, not a parameter: balance moves it by the sign of the load error, never by the gradient.
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.e_score_correction_bias: Tensor

    def forward(self, x_NH: Tensor) -> Routing:
        """Choose experts for each row of `x_NH`; weights sum to `routed_scaling_factor` if `norm_topk_prob`."""
        config = self.config
        with torch.autocast(x_NH.device.type, enabled=False):
            if x_NH.is_cuda and not torch.is_grad_enabled() and router_obstacle(config, x_NH.device) is None:
                from teacher.kernels.router import choose

                logits_NE = self._logits(x_NH)
                indices_NK, weights_NK = choose(logits_NE.unsqueeze(0), self.e_score_correction_bias, config)
                return Routing(indices_NK, weights_NK, logits_NE.sigmoid_())
            scores_NE = self._logits(x_NH).sigmoid()
            with torch.no_grad():
                biased_NE = scores_NE + self.e_score_correction_bias
                indices_NK = choose_experts(biased_NE, config.n_group, config.topk_group, config.num_experts_per_tok)
            weights_NK = scores_NE.gather(1, indices_NK)
            if config.norm_topk_prob:
                weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
            return Routing(indices_NK, weights_NK * config.routed_scaling_factor, scores_NE)

    def _logits(self, x_NH: Tensor) -> Tensor:
        """Products of bf16 are exact in fp32, so tensor cores, which add in fp32, serve as well."""
        if x_NH.is_cuda and x_NH.dtype == self.weight.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            return torch.mm(x_NH, self.weight.t(), out_dtype=torch.float32)
        return F.linear(x_NH.float(), self.weight.float())


def router_obstacle(config: DeepseekV3Config, device: torch.device) -> str | None:
    """Why the kernel (teacher/kernels/router.py) cannot choose for this model there, or None."""
    experts, groups = config.n_routed_experts, config.n_group
    if experts & (experts - 1) or groups & (groups - 1):
        return f"its router takes powers of two of experts and groups, not {experts} in {groups}"
    return obstacle(device)


def choose_experts(biased_NE: Tensor, n_group: int, topk_group: int, top_k: int) -> Tensor:
    """The `top_k` best experts (int64, (N, K)) among the `topk_group` groups whose two best experts sum highest.

    Experts of the other groups are masked with -inf, as in DeepSeek's inference/model.py. Masking with 0 lets an
    unselected expert win whenever the biased scores of the selected groups are negative, which a small score with a
    small negative bias makes happen. transformers long masked with 0; 5.17 and 5.19 mask with -inf in this model, and
    still with 0 in others that copied it (mistral4, axk2).
    """
    if topk_group < n_group:
        grouped_NGE = biased_NE.unflatten(-1, (n_group, -1))
        group_scores_NG = grouped_NGE.topk(2, dim=-1).values.sum(-1)
        kept_NG = group_scores_NG.topk(topk_group, dim=-1, sorted=False).indices
        dropped_NG = torch.ones_like(group_scores_NG, dtype=torch.bool).scatter_(1, kept_NG, False)
        biased_NE = grouped_NGE.masked_fill(dropped_NG.unsqueeze(-1), float("-inf")).flatten(1)
    return biased_NE.topk(top_k, dim=-1, sorted=False).indices

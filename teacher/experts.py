"""Mixture of experts: routed experts as grouped products over tokens sorted by expert, plus a shared expert.

DeepSeekMoE arXiv 2401.06066; DeepSeek-V3 section 2.1.2.

Shapes: N tokens, H hidden, E routed experts, K experts a token, I expert intermediate, M = N * K (token, expert) pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.config import DeepseekV3Config
from teacher.routing import Router, Routing


class MLP(nn.Module):
    """SwiGLU feed-forward: the dense layers and the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed experts of one layer, stacked; on disk each expert has its own gate, up and down matrix."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x_NH: Tensor, routing: Routing) -> Tensor:
        return grouped_experts(x_NH, routing.indices_NK, routing.weights_NK, self.gate_up_proj, self.down_proj)


def grouped_experts(
    x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor
) -> Tensor:
    """Sum over each token's experts of weight * expert(token), with two grouped products for all experts at once."""
    top_k = indices_NK.shape[1]
    if torch.is_autocast_enabled(x_NH.device.type):
        dtype = torch.get_autocast_dtype(x_NH.device.type)
        x_NH, gate_up_E2IH, down_EHI = x_NH.to(dtype), gate_up_E2IH.to(dtype), down_EHI.to(dtype)
    sorted_experts_M, order_M = indices_NK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(
        sorted_experts_M, torch.arange(gate_up_E2IH.shape[0], device=x_NH.device), right=True, out_int32=True
    )
    rows_MH = x_NH[order_M // top_k]
    gate_MI, up_MI = F.grouped_mm(rows_MH, gate_up_E2IH.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    out_MH = F.grouped_mm(F.silu(gate_MI) * up_MI, down_EHI.transpose(1, 2), offs=ends_E)
    out_MH = out_MH * weights_NK.flatten()[order_M].unsqueeze(-1).to(out_MH.dtype)
    return torch.zeros_like(x_NH).index_add(0, order_M // top_k, out_MH)


def reference_experts(
    x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor
) -> Tensor:
    """The definition, one expert at a time: what `grouped_experts` is tested against."""
    out_NH = torch.zeros_like(x_NH)
    for expert in range(gate_up_E2IH.shape[0]):
        token, slot = (indices_NK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_NH[token], gate_up_E2IH[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down_EHI[expert])
        out_NH = out_NH.index_add(0, token, out * weights_NK[token, slot, None].to(out.dtype))
    return out_NH


class MoE(nn.Module):
    """Routed experts plus the shared expert that every token visits."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x_BTH: Tensor) -> tuple[Tensor, Routing]:
        x_NH = x_BTH.flatten(0, -2)
        routing = self.gate(x_NH)
        out_BTH = self.experts(x_NH, routing).view_as(x_BTH)
        if self.shared_experts is not None:
            out_BTH = out_BTH + self.shared_experts(x_BTH)
        return out_BTH, routing

"""Mixture of experts: routed experts as grouped products over tokens sorted by expert, plus a shared expert.

DeepSeekMoE arXiv 2401.06066; DeepSeek-V3 section 2.1.2.

Shapes: N tokens, H hidden, E routed experts, K experts a token, I expert intermediate, M = N * K (token, expert)
pairs, R rows of the layout (M, or a few more).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher import shapes
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
        # Grouped products want rows of whole 16-byte units (8 values of bf16); every published model has them.
        aligned = all(size % 8 == 0 for size in self.down_proj.shape[1:])
        product = grouped_experts if aligned else reference_experts
        return product(x_NH, routing.indices_NK, routing.weights_NK, self.gate_up_proj, self.down_proj)


class Layout(NamedTuple):
    """Where the (token, expert) pairs lie when rows are arranged expert by expert."""

    token_R: Tensor  # token of each row; filling rows repeat token 0 and are never read back
    row_NK: Tensor  # row of each pair, int64
    ends_E: Tensor  # end of each expert's rows, int32


def expert_layout(indices_NK: Tensor, experts: int, multiple: int) -> Layout:
    """Rows sorted by expert, each expert's rows filled up to a multiple of `multiple`.

    On a GPU there are as many rows as the worst balance takes: those after the last expert's are nobody's.
    """
    tokens, top_k = indices_NK.shape
    pairs_M = torch.arange(tokens * top_k, device=indices_NK.device)
    sorted_M, order_M = indices_NK.flatten().sort(stable=True)
    exact_E = torch.searchsorted(sorted_M, torch.arange(experts, device=indices_NK.device), right=True)
    if multiple == 1:
        token_R, row_of_sorted_M, ends_E = order_M // top_k, pairs_M, exact_E
    else:
        counts_E = exact_E.diff(prepend=exact_E.new_zeros(1))
        filled_E = (counts_E + multiple - 1) // multiple * multiple
        ends_E = filled_E.cumsum(0)
        shift_E = (ends_E - filled_E) - (exact_E - counts_E)
        row_of_sorted_M = pairs_M + shift_E[sorted_M]
        most = len(pairs_M) + min(experts, len(pairs_M)) * (multiple - 1)
        rows = most // multiple * multiple if shapes.fixed(indices_NK) else int(ends_E[-1])
        token_R = order_M.new_zeros(rows).scatter_(0, row_of_sorted_M, order_M // top_k)
    row_NK = torch.empty_like(order_M).scatter_(0, order_M, row_of_sorted_M).view(tokens, top_k)
    return Layout(token_R, row_NK, ends_E.int())


class _Arrange(torch.autograd.Function):
    """Rows of the layout from tokens. A token's gradient is the sum over its own rows, in their order: what adds up
    otherwise, row by row into tokens, does so by atomic additions in an order that changes from run to run."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, token_R: Tensor, row_NK: Tensor, used_R: Tensor | None) -> Tensor:
        ctx.save_for_backward(row_NK)
        rows_RH = x_NH.index_select(0, token_R)
        return rows_RH if used_R is None else rows_RH.masked_fill_(~used_R.unsqueeze(1), 0)

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None, None, None]:
        (row_NK,) = ctx.saved_tensors
        return grad_RH.index_select(0, row_NK.flatten()).unflatten(0, row_NK.shape).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """Each token's rows, weighted and summed. Its gradient goes to rows as rows: as a product of a token's weights and
    its gradient, K x 1 by 1 x H, it took an eighth of a step. Rows that no pair has get none, whatever they hold."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, weights_NK: Tensor, token_R: Tensor, row_NK: Tensor) -> Tensor:
        out_NKH = rows_RH.index_select(0, row_NK.flatten()).unflatten(0, row_NK.shape)
        ctx.save_for_backward(out_NKH, weights_NK, token_R, row_NK)
        return torch.bmm(weights_NK.unsqueeze(1), out_NKH).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, Tensor, None, None]:
        out_NKH, weights_NK, token_R, row_NK = ctx.saved_tensors
        weights_R = weights_NK.new_zeros(len(token_R)).index_copy_(0, row_NK.flatten(), weights_NK.flatten())
        grad_RH = grad_NH.index_select(0, token_R).mul_(weights_R.unsqueeze(1))
        return grad_RH, torch.bmm(out_NKH, grad_NH.unsqueeze(2)).squeeze(2), None, None


class _WithoutRows(torch.autograd.Function):
    """Weights as they are; the gradient of an expert without rows is zeros, which a GPU's grouped product over rows
    does not promise: it may leave what was in memory."""

    @staticmethod
    def forward(ctx: Any, weight_EOK: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return weight_EOK.view_as(weight_EOK)

    @staticmethod
    def backward(ctx: Any, grad_EOK: Tensor) -> tuple[Tensor, None]:
        (ends_E,) = ctx.saved_tensors
        empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return grad_EOK.masked_fill(empty_E.view(-1, 1, 1), 0), None


def arrange(x_NH: Tensor, layout: Layout, blank: bool = False) -> Tensor:
    """The layout's rows (R, H) of tokens; with `blank` filling rows are zeros instead of copies of token 0."""
    used_R = None
    if blank:
        used_R = torch.zeros_like(layout.token_R, dtype=torch.bool).index_fill_(0, layout.row_NK.flatten(), True)
    if shapes.fixed(x_NH) and torch.is_grad_enabled():
        rows_RH: Tensor = _Arrange.apply(x_NH, layout.token_R, layout.row_NK, used_R)
        return rows_RH
    rows_RH = x_NH.index_select(0, layout.token_R)
    return rows_RH if used_R is None else rows_RH * used_R.unsqueeze(1)


def combine(rows_RH: Tensor, weights_NK: Tensor, layout: Layout) -> Tensor:
    """Sum over each token's pairs of weight * row, (N, H)."""
    weights_NK = weights_NK.to(rows_RH.dtype)
    if shapes.fixed(rows_RH) and torch.is_grad_enabled():
        sum_NH: Tensor = _Combine.apply(rows_RH, weights_NK, layout.token_R, layout.row_NK)
        return sum_NH
    out_NKH = rows_RH.index_select(0, layout.row_NK.flatten()).unflatten(0, layout.row_NK.shape)
    return torch.bmm(weights_NK.unsqueeze(1), out_NKH).squeeze(1)


def grouped_experts(
    x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor
) -> Tensor:
    """Sum over each token's experts of weight * expert(token), with two grouped products for all experts at once.

    In bf16 on a CPU each expert's rows are filled up to a multiple of 64: oneDNN compiles a kernel for every new row
    count, and exact layouts bring new counts at every step. Training E = 32 on 8k tokens, top-4: 49 ms a layer filled,
    130 to 360 exact; float32 (78 ms) has no such cost. Padding every expert to the largest load and a batched product
    is as fast while experts are balanced, and half as fast in float32 when one has twice the mean.
    """
    device = x_NH.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_NH, gate_up_E2IH, down_EHI = x_NH.to(dtype), gate_up_E2IH.to(dtype), down_EHI.to(dtype)
    multiple = 64 if device == "cpu" and x_NH.dtype == torch.bfloat16 else 1
    layout = expert_layout(indices_NK, gate_up_E2IH.shape[0], multiple)
    rows_RH = arrange(x_NH, layout)
    if shapes.fixed(x_NH) and torch.is_grad_enabled():
        gate_up_E2IH = _WithoutRows.apply(gate_up_E2IH, layout.ends_E)
        down_EHI = _WithoutRows.apply(down_EHI, layout.ends_E)
    gate_RI, up_RI = F.grouped_mm(rows_RH, gate_up_E2IH.transpose(1, 2), offs=layout.ends_E).chunk(2, dim=-1)
    out_RH = F.grouped_mm(F.silu(gate_RI) * up_RI, down_EHI.transpose(1, 2), offs=layout.ends_E)
    return combine(out_RH, weights_NK, layout)


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

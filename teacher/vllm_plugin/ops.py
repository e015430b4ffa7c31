"""The two products as torch operators, which vLLM's compiler takes as they are instead of looking inside.

By kernels where they run, else by the plain definitions; said once which.

Shapes: N tokens, H and O columns of input and output, E experts, K experts a token, I expert intermediate; h, o, i in
blocks of 128.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher import fp8_products as plain
from teacher.experts import expert_layout
from teacher.fp8 import WEIGHT_BLOCK
from teacher.fp8_products import Quantized
from teacher.kernels.arguments import obstacle


@functools.cache
def by_kernels(device: torch.device) -> bool:
    reason = obstacle(device)
    log = logging.getLogger("vllm.distill_fp8")  # below vLLM's own logger, whose handlers it needs
    log.info("distill_fp8: %s", "kernels" if reason is None else f"plain definitions, {reason}")
    return reason is None


@torch.library.custom_op("distill::fp8_linear", mutates_args=())
def fp8_linear(x_NH: Tensor, w_OH: Tensor, scale_oh: Tensor) -> Tensor:
    """x w^T, (N, O) in x's dtype: x quantised in tiles of 1 x 128, w e4m3 in blocks of 128 x 128."""
    w = Quantized(w_OH, scale_oh, WEIGHT_BLOCK)
    if by_kernels(x_NH.device):
        from teacher.kernels import products

        return products.product(products.along_columns(x_NH), w, x_NH.dtype)
    return plain.product(plain.along_columns(x_NH), w, x_NH.dtype)


@fp8_linear.register_fake
def _(x_NH: Tensor, w_OH: Tensor, scale_oh: Tensor) -> Tensor:
    return x_NH.new_empty(x_NH.shape[0], w_OH.shape[0])


@torch.library.custom_op("distill::fp8_experts", mutates_args=())
def fp8_experts(
    x_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor,
    down_scale: Tensor,
) -> Tensor:  # fmt: skip
    """Sum of each token's experts by weight, (N, H): gate_up (E, 2I, H), down (E, H, I), all of E held here."""
    if by_kernels(x_NH.device):
        from teacher.kernels.expert_layer import expert_layer
        from teacher.kernels.operands import Fp8

        return expert_layer(x_NH, ids_NK, weights_NK, Fp8(gate_up, gate_up_scale), Fp8(down, down_scale))
    layout = expert_layout(ids_NK.long(), len(gate_up), 1)
    rows = plain.along_columns(x_NH.index_select(0, layout.token_R))
    first = Quantized(gate_up, gate_up_scale, WEIGHT_BLOCK)
    gate_RI, up_RI = plain.grouped_product(rows, first, layout.ends_E, torch.float32).chunk(2, dim=-1)
    hidden = plain.along_columns(F.silu(gate_RI) * up_RI)
    second = Quantized(down, down_scale, WEIGHT_BLOCK)
    out_RH = plain.grouped_product(hidden, second, layout.ends_E, torch.float32)
    out_NKH = out_RH.index_select(0, layout.row_NK.flatten()).unflatten(0, ids_NK.shape)
    return (weights_NK.float().unsqueeze(-1) * out_NKH).sum(1).to(x_NH.dtype)


@fp8_experts.register_fake
def _(
    x_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor,
    down_scale: Tensor,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x_NH)

"""RMSNorm with a hand-written backward: autograd's own takes six times as long on a CPU, an eighth of a training step.

RMSNorm: arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return _RMSNormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad32, weight32 = grad.float(), weight.float()
        # LayerNorm's fused backward, told that the mean is 0, subtracts the mean of grad * weight; put that back.
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad32, x.float(), weight.shape, torch.zeros_like(scale), scale, weight32, None, (True, True, False)
        )
        grad_x.add_(scale * (grad32 @ weight32).div_(x.shape[-1]).unsqueeze(-1))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None

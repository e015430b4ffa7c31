"""Linear layers whose weights stay in FP8: attention's projections and the dense feed-forward, as DeepSeek ships them.

An FP8 checkpoint of DeepSeek-V3's holds these matrices in one byte a value too; a step of few tokens is bound by
reading them. Activations are rounded to FP8 in tiles of 1 x 128 before the product (DeepSeek-V3 section 3.3), weights
are blocks of 128 x 128. `kv_b_proj` stays in the model's dtype: the absorbed form multiplies by its halves head by
head, along either dimension.

Shapes: N tokens, K inputs, O outputs; k and o in blocks of 128.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.attention import MultiHeadLatentAttention
from teacher.experts import MLP
from teacher.fp8 import ACTIVATION_BLOCK, FP8, dequantize, quantize, scale_shape
from teacher.quantized_experts import chosen_path

if TYPE_CHECKING:
    from teacher.kernels.operands import Groups
    from teacher.kernels.tuning import Tile

_KEPT = ("kv_b_proj",)


class QuantizedLinear(nn.Module):
    """`nn.Linear` with its weight in FP8. For inference; a shape that the kernels do not take is refused wherever the
    model lies."""

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None, device: torch.device | str) -> None:
        super().__init__()
        if inputs % 16:
            raise ValueError(f"a linear layer of {inputs} inputs; taken in FP8: a multiple of 16")
        self.weight: Tensor
        self.weight_scale: Tensor
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=FP8, device=device))
        scales = torch.empty(*scale_shape((outputs, inputs)), dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", scales)
        self.bias = bias

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> QuantizedLinear:
        """The same layer, quantised; on meta, where there are no values, room for it."""
        made = cls(linear.in_features, linear.out_features, linear.bias, linear.weight.device)
        if not linear.weight.is_meta:
            values, scales = quantize(linear.weight)
            made.weight.copy_(values)
            made.weight_scale.copy_(scales)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., O), in x's dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("layers quantised to FP8 have no backward; train with fp8 = true in the training config")
        x_NK = x.reshape(-1, x.shape[-1])
        by_kernels = chosen_path(x.device) == "kernels"
        out_NO = (_by_kernels if by_kernels else linear_reference)(x_NK, self.weight, self.weight_scale)
        if self.bias is not None:
            out_NO = out_NO + self.bias.to(out_NO.dtype)
        return out_NO.view(*x.shape[:-1], -1)


def linear_reference(x_NK: Tensor, weight_OK: Tensor, scale_ok: Tensor) -> Tensor:
    """The definition: activations rounded to FP8, everything dequantised, an fp32 product, rounded once."""
    rounded_NK = dequantize(*quantize(x_NK, ACTIVATION_BLOCK), torch.float32, ACTIVATION_BLOCK)
    return F.linear(rounded_NK, dequantize(weight_OK, scale_ok, torch.float32)).to(x_NK.dtype)


def _by_kernels(x_NK: Tensor, weight_OK: Tensor, scale_ok: Tensor) -> Tensor:
    from teacher.kernels.grouped_gemm import grouped_gemm
    from teacher.kernels.operands import Fp8
    from teacher.kernels.quantize import quantize_activations

    rows, (outputs, inputs) = len(x_NK), weight_OK.shape
    out_NO = torch.empty(rows, outputs, dtype=x_NK.dtype, device=x_NK.device)
    x8 = Fp8(*quantize_activations(x_NK.contiguous()))
    chosen = tile("gemm", outputs, inputs, rows, x_NK.device)
    return grouped_gemm(x8, Fp8(weight_OK[None], scale_ok[None]), all_rows(rows, x_NK.device), out_NO, chosen)


def tile(kind: str, outputs: int, inputs: int, rows: int, device: torch.device) -> Tile:
    """How a product of one matrix is cut up: for many rows as the grouped ones of many rows an expert are."""
    from teacher.kernels.tuning import Tile, tile_for

    if rows > 64 and device.type == "cuda":
        return Tile(128, 128, 2, warps=8, stages=4, specialize=True)
    return tile_for(kind, outputs, inputs, rows, 1, device)


def all_rows(rows: int, device: torch.device) -> Groups:
    """One group of `rows` rows. Without a copy from the host, which could not be recorded in a CUDA graph."""
    from teacher.kernels.operands import Groups

    numbers = row_numbers(rows + 1, device)
    return Groups(numbers[:1], numbers[rows:])


def row_numbers(rows: int, device: torch.device) -> Tensor:
    """0, 1, … int32."""
    return _numbers(max(4096, 1 << (rows - 1).bit_length()), device)[:rows]


@functools.cache
def _numbers(most: int, device: torch.device) -> Tensor:
    """Never given back: CUDA graphs hold its address."""
    return torch.arange(most, dtype=torch.int32, device=device)


def quantize_linears(model: nn.Module) -> None:
    """Replace the projections of attention and of dense and shared feed-forwards by their FP8 form, one by one."""
    for owner in [module for module in model.modules() if isinstance(module, MultiHeadLatentAttention | MLP)]:
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear) and name not in _KEPT:
                setattr(owner, name, QuantizedLinear.of(child))

"""The three products of a layer trained in FP8, on quantised operands: forward, gradient of input, gradient of weight.

DeepSeek-V3 section 3.3: values in e4m3 throughout, scales by tiles along the dimension that the product sums over, so
that partial sums of 128 can be scaled in fp32. Here the arithmetic is emulated (teacher.kernels.products is the same
by kernels): operands are multiplied back by their
scales and multiplied in fp32, which is what FP8 units with promotion to fp32 every 128 products compute, up to the
order of fp32 additions (Hopper's own accumulation inside the 128 keeps fewer bits; section 3.5.2).

Shapes: N rows (tokens), K and O columns of input and output, E experts, R rows sorted by expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.fp8 import ACTIVATION_BLOCK, WEIGHT_BLOCK, decode, dequantize, quantize

TOKEN_BLOCK = (128, 1)  # of a product that sums over tokens


class Quantized(NamedTuple):
    """A matrix, or a stack of them, in block FP8."""

    values: Tensor  # (..., R, C) e4m3
    scale: Tensor  # (..., r, c) fp32
    block: tuple[int, int]

    def dequantized(self) -> Tensor:
        """fp32."""
        if self.values.dim() == 3:
            return torch.stack([Quantized(v, s, self.block).dequantized() for v, s in zip(*self[:2], strict=True)])
        if self.block == WEIGHT_BLOCK:
            return dequantize(self.values, self.scale, torch.float32, self.block)
        # A scale for every row, or for every column: no strips are needed to find it.
        down, across = self.block
        scale = self.scale.repeat_interleave(down, dim=0) if down > 1 else self.scale
        scale = scale.repeat_interleave(across, dim=1) if across > 1 else scale
        return decode(self.values).mul_(scale[: self.values.shape[0], : self.values.shape[1]])


def along_columns(x_RC: Tensor) -> Quantized:
    """Tiles of 1 x 128, of an activation or its gradient whose columns the product sums over."""
    return Quantized(*quantize(x_RC, ACTIVATION_BLOCK), ACTIVATION_BLOCK)


def along_tokens(x_RC: Tensor) -> Quantized:
    """Tiles of 128 x 1, where the product sums over tokens."""
    return Quantized(*quantize(x_RC, TOKEN_BLOCK), TOKEN_BLOCK)


def weight(w: Tensor) -> Quantized:
    """Blocks of 128 x 128, of one matrix (O, K) or a stack (E, O, K)."""
    if w.dim() == 2:
        return Quantized(*quantize(w, WEIGHT_BLOCK), WEIGHT_BLOCK)
    values, scales = zip(*(quantize(matrix, WEIGHT_BLOCK) for matrix in w), strict=True)
    return Quantized(torch.stack(values), torch.stack(scales), WEIGHT_BLOCK)


def both_ways(x_RC: Tensor) -> tuple[Quantized, Quantized]:
    """`along_columns` and `along_tokens`, which a gradient needs both; kernels read it once for the two."""
    return along_columns(x_RC), along_tokens(x_RC)


def weight_both(w: Tensor) -> tuple[Quantized, Quantized]:
    """`weight`, and the same transposed, (..., K, O): `product` with it gives the gradient of the input."""
    plain = weight(w)
    return plain, Quantized(plain.values.mT, plain.scale.mT, WEIGHT_BLOCK)


def again_along_tokens(x_RC: Quantized) -> Quantized:
    """Tiles of 128 x 1 of what was kept in tiles of 1 x 128: a second rounding, which the paper takes too."""
    return along_tokens(x_RC.dequantized())


def product(x_NK: Quantized, w_OK: Quantized, dtype: torch.dtype) -> Tensor:
    """x w^T, (N, O)."""
    return F.linear(x_NK.dequantized(), w_OK.dequantized()).to(dtype)


def weight_product(dy_NO: Quantized, x_NK: Quantized) -> Tensor:
    """dy^T x, (O, K) fp32, of operands in tiles along tokens."""
    return dy_NO.dequantized().mT @ x_NK.dequantized()


def grouped_product(x_RK: Quantized, w_EOK: Quantized, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's rows times its own matrix, (R, O); `ends_E` int32, the end of each expert's rows."""
    return F.grouped_mm(x_RK.dequantized(), w_EOK.dequantized().mT, offs=ends_E).to(dtype)


def grouped_weight_product(dy_RO: Quantized, x_RK: Quantized, ends_E: Tensor) -> Tensor:
    """dy^T x within each expert's rows, (E, O, K) fp32. An expert without rows gets zeros."""
    return F.grouped_mm(dy_RO.dequantized().mT, x_RK.dequantized(), offs=ends_E)

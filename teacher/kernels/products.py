"""The products of FP8 training by kernels: `teacher.fp8_products`, function by function, on Hopper's FP8 units.

What is quantised in tiles along tokens is held transposed, tokens last: FP8 units want the dimension that a product
sums over to lie value by value. A dense layer is an expert with all rows.

Shapes as in teacher.fp8_products.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.fp8 import ACTIVATION_BLOCK, WEIGHT_BLOCK
from teacher.fp8_products import TOKEN_BLOCK, Quantized
from teacher.kernels.grouped_gemm import grouped_gemm
from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.quantize import quantize_activations, quantize_activations_transposed, quantize_weights
from teacher.kernels.weight_gemm import grouped_weight_gemm


def along_columns(x_RC: Tensor) -> Quantized:
    return Quantized(*quantize_activations(x_RC.contiguous()), ACTIVATION_BLOCK)


def along_tokens(x_RC: Tensor) -> Quantized:
    """Values (C, R) and scales (C, r)."""
    return Quantized(*quantize_activations_transposed(x_RC.contiguous()), TOKEN_BLOCK)


def again_along_tokens(x_RC: Quantized) -> Quantized:
    rows, columns = x_RC.values.shape
    padded = F.pad(x_RC.values.float(), (0, -columns % 128)).view(rows, -1, 128)
    return along_tokens((padded * x_RC.scale.unsqueeze(-1)).view(rows, -1)[:, :columns])


def weight(w: Tensor) -> Quantized:
    return Quantized(*quantize_weights(w.contiguous()), WEIGHT_BLOCK)


def product(x_NK: Quantized, w_OK: Quantized, dtype: torch.dtype) -> Tensor:
    return _product(x_NK, w_OK.values[None], w_OK.scale[None], _all_rows(len(x_NK.values), x_NK.values.device), dtype)


def input_product(dy_NO: Quantized, w_OK: Quantized, dtype: torch.dtype) -> Tensor:
    groups = _all_rows(len(dy_NO.values), dy_NO.values.device)
    return _product(dy_NO, w_OK.values.mT.contiguous()[None], w_OK.scale.mT.contiguous()[None], groups, dtype)


def weight_product(dy_NO: Quantized, x_NK: Quantized) -> Tensor:
    groups = _all_rows(dy_NO.values.shape[1], dy_NO.values.device)
    return grouped_weight_gemm(Fp8(*dy_NO[:2]), Fp8(*x_NK[:2]), groups)[0]


def grouped_product(x_RK: Quantized, w_EOK: Quantized, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    return _product(x_RK, w_EOK.values, w_EOK.scale, _groups(ends_E), dtype)


def grouped_input_product(dy_RO: Quantized, w_EOK: Quantized, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    return _product(dy_RO, w_EOK.values.mT.contiguous(), w_EOK.scale.mT.contiguous(), _groups(ends_E), dtype)


def grouped_weight_product(dy_RO: Quantized, x_RK: Quantized, ends_E: Tensor) -> Tensor:
    return grouped_weight_gemm(Fp8(*dy_RO[:2]), Fp8(*x_RK[:2]), _groups(ends_E))


def _product(x: Quantized, w_EOK: Tensor, scale_EOK: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.values.shape[0], w_EOK.shape[1], dtype=dtype, device=x.values.device)
    return grouped_gemm(Fp8(*x[:2]), Fp8(w_EOK, scale_EOK), groups, out)


def _groups(ends_E: Tensor) -> Groups:
    start_E = F.pad(ends_E[:-1], (1, 0))
    return Groups(start_E, ends_E - start_E)


@functools.lru_cache(maxsize=64)
def _all_rows(rows: int, device: torch.device) -> Groups:
    count = torch.tensor([rows], dtype=torch.int32, device=device)
    return Groups(torch.zeros_like(count), count)

"""The products of FP8 training by kernels: `teacher.fp8_products`, function by function, on Hopper's FP8 units.

What is quantised in tiles along tokens is held transposed, tokens last: FP8 units want the dimension that a product
sums over to lie value by value. A dense layer is an expert with all rows.

Shapes as in teacher.fp8_products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.fp8 import ACTIVATION_BLOCK, FP8, WEIGHT_BLOCK
from teacher.fp8_products import TOKEN_BLOCK, Quantized
from teacher.kernels.grouped_gemm import grouped_gemm
from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.quantize import (
    quantize_activations,
    quantize_activations_both_ways,
    quantize_activations_transposed,
    quantize_weights,
    quantize_weights_both_ways,
    requantize_transposed,
)
from teacher.kernels.weight_gemm import WeightTile, grouped_weight_gemm

_TILES = 528  # of a weight's gradient, 4 for each multiprocessor: tokens are cut into parts until there are so many
_LEAST_BLOCKS = 8  # of 128 tokens in a part
_PARTS: dict[tuple[int, int, torch.device, int], Groups] = {}


def along_columns(x_RC: Tensor) -> Quantized:
    return Quantized(*quantize_activations(x_RC.contiguous()), ACTIVATION_BLOCK)


def along_tokens(x_RC: Tensor) -> Quantized:
    """Values (C, R) and scales (C, r)."""
    return Quantized(*quantize_activations_transposed(x_RC.contiguous()), TOKEN_BLOCK)


def both_ways(x_RC: Tensor) -> tuple[Quantized, Quantized]:
    plain, turned = quantize_activations_both_ways(x_RC.contiguous())
    return Quantized(*plain, ACTIVATION_BLOCK), Quantized(*turned, TOKEN_BLOCK)


def weight_both(w: Tensor) -> tuple[Quantized, Quantized]:
    plain, turned = quantize_weights_both_ways(w.contiguous())
    return Quantized(*plain, WEIGHT_BLOCK), Quantized(*turned, WEIGHT_BLOCK)


def again_along_tokens(x_RC: Quantized) -> Quantized:
    return Quantized(*requantize_transposed(*x_RC[:2]), TOKEN_BLOCK)


def weight(w: Tensor) -> Quantized:
    return Quantized(*quantize_weights(w.contiguous()), WEIGHT_BLOCK)


def product(x_NK: Quantized, w_OK: Quantized, dtype: torch.dtype) -> Tensor:
    groups = _parts(len(x_NK.values), len(x_NK.values), x_NK.values.device)
    return _product(x_NK, w_OK.values[None], w_OK.scale[None], groups, dtype)


def weight_product(dy_NO: Quantized, x_NK: Quantized) -> Tensor:
    """In parts of the tokens, as many as keep the chip busy, as if they were experts; then their sum."""
    (outputs, tokens), inputs = dy_NO.values.shape, x_NK.values.shape[0]
    parts = max(1, _TILES // max(1, -(-outputs // WeightTile().rows) * -(-inputs // WeightTile().columns)))
    each = max(_LEAST_BLOCKS, -(-tokens // (128 * parts)))
    groups = _parts(tokens, each * 128, dy_NO.values.device)
    found = grouped_weight_gemm(Fp8(*dy_NO[:2]), Fp8(*x_NK[:2]), groups)
    return found[0] if len(found) == 1 else found.sum(0)


def grouped_product(x_RK: Quantized, w_EOK: Quantized, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    return _product(x_RK, w_EOK.values, w_EOK.scale, _groups(ends_E), dtype)


def grouped_weight_product(dy_RO: Quantized, x_RK: Quantized, ends_E: Tensor) -> Tensor:
    return grouped_weight_gemm(Fp8(*dy_RO[:2]), Fp8(*x_RK[:2]), _groups(ends_E))


def _product(x: Quantized, w_EOK: Tensor, scale_EOK: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
    x_RK = x.values
    if short := -x_RK.shape[1] % 16:  # TMA's rows begin at multiples of 16 bytes; only a toy's do not
        x_RK, w_EOK = (F.pad(t.view(torch.uint8), (0, short)).view(FP8) for t in (x_RK, w_EOK))
    out = torch.empty(len(x_RK), w_EOK.shape[1], dtype=dtype, device=x_RK.device)
    return grouped_gemm(Fp8(x_RK, x.scale), Fp8(w_EOK, scale_EOK), groups, out)


def _groups(ends_E: Tensor) -> Groups:
    start_E = F.pad(ends_E[:-1], (1, 0))
    return Groups(start_E, ends_E - start_E)


def _parts(rows: int, each: int, device: torch.device) -> Groups:
    """`rows` rows in parts of `each`, filled on the device: a copy from the host could not be captured in a CUDA graph.

    Kept for good, since graphs hold on to their addresses, and for the stream that filled them; not those made while
    one is captured, which are the graph's.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (found := _PARTS.get((rows, each, device, stream))) is not None:
        return found
    start = torch.arange(0, max(1, rows), max(1, each), dtype=torch.int32, device=device)
    made = Groups(start, (rows - start).clamp_(max=each))
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        _PARTS[rows, each, device, stream] = made
    return made

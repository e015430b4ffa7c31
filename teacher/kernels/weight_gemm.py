"""The gradient of expert weights in FP8: dy^T x within each expert's rows, tiles of 128 tokens, fp32 sums.

The third product of FP8 training (DeepSeek-V3 section 3.3.1, "Wgrad"): it sums over tokens, so both operands come
transposed, in tiles of 1 x 128 along the tokens (`quantize_activations_transposed`), and each has a scale for every row
and every 128 tokens. An expert's rows begin at a multiple of 128, so that no tile holds two experts. A dense layer is
one expert with all rows.

Floors, for R rows in all and O x K matrices: 2 R O K FLOP; bytes R (O + K) of values + 4 E O K of fp32 result (and a
32nd of the values in scales). The result is what moves: from 2 x 128 rows an expert on the arithmetic takes longer.

Shapes: R rows (tokens), E experts, O and K columns of the layer's output and input; r in tiles of 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.fp8 import ACTIVATION_BLOCK, FP8, dequantize
from teacher.kernels.arguments import same_device, take
from teacher.kernels.operands import Fp8, Groups

_COLUMNS = 128


@triton.jit
def _weight_kernel(
    dy, x, dy_stride, x_stride, dy_scales, x_scales, dy_scale_O, dy_scale_r, x_scale_K, x_scale_r, out, start_E,
    count_E, outputs, inputs, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile (COLUMNS of O) x (COLUMNS of K) of one expert's gradient."""
    BLOCK: tl.constexpr = 128
    across = tl.cdiv(inputs, COLUMNS)
    tiles = tl.cdiv(outputs, COLUMNS) * across
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start, count = tl.load(start_E + expert), tl.load(count_E + expert)
    o = tile // across * COLUMNS + tl.arange(0, COLUMNS)
    k = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, BLOCK)
    dy_at = dy + o.to(tl.int64)[:, None] * dy_stride + (start + token)[None, :]
    x_at = x + k.to(tl.int64)[:, None] * x_stride + (start + token)[None, :]
    dy_scale_at = dy_scales + o.to(tl.int64) * dy_scale_O + start // BLOCK * dy_scale_r
    x_scale_at = x_scales + k.to(tl.int64) * x_scale_K + start // BLOCK * x_scale_r
    total = tl.zeros([COLUMNS, COLUMNS], tl.float32)
    for done in tl.range(0, count, BLOCK):
        real = (done + token < count)[None, :]
        a = tl.load(dy_at + done, mask=(o < outputs)[:, None] & real, other=0.0)
        b = tl.load(x_at + done, mask=(k < inputs)[:, None] & real, other=0.0)
        a_scale = tl.load(dy_scale_at + done // BLOCK * dy_scale_r, mask=o < outputs, other=0.0)
        b_scale = tl.load(x_scale_at + done // BLOCK * x_scale_r, mask=k < inputs, other=0.0)
        total += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
    place = out + expert.to(tl.int64) * outputs * inputs + o.to(tl.int64)[:, None] * inputs + k[None, :]
    tl.store(place, total, mask=(o < outputs)[:, None] & (k < inputs)[None, :])


def grouped_weight_gemm(dy: Fp8, x: Fp8, groups: Groups) -> Tensor:
    """dy^T x of each expert's rows, (E, O, K) fp32; an expert without rows gets zeros.

    dy (O, R) with scales (O, r) and x (K, R) with (K, r). `groups` starts at multiples of 128, which is not checked:
    it would wait for the device.
    """
    for name, operand in (("dy", dy), ("x", x)):
        take(f"{name}.values", operand.values, (FP8,), (2,))
        wanted = [operand.values.shape[0], -(-operand.values.shape[1] // 128)]
        if operand.scales.dtype != torch.float32 or list(operand.scales.shape) != wanted:
            found = f"{operand.scales.dtype} of shape {list(operand.scales.shape)}"
            raise ValueError(f"{name}.scales is {found}; taken: float32 of shape {wanted}")
    if dy.values.shape[1] != x.values.shape[1]:
        raise ValueError(f"dy.values has {dy.values.shape[1]} tokens, x.values {x.values.shape[1]}; taken: the same")
    take("start_E", groups.start_E, (torch.int32,), (1,), contiguous=True)
    take("count_E", groups.count_E, (torch.int32,), (1,), contiguous=True)
    same_device(dy=dy.values, x=x.values, start_E=groups.start_E, count_E=groups.count_E)
    (o, rows), k, experts = dy.values.shape, x.values.shape[0], len(groups.start_E)
    out_EOK = torch.empty(experts, o, k, dtype=torch.float32, device=dy.values.device)
    if out_EOK.numel() and rows:
        grid = (experts * -(-o // _COLUMNS) * -(-k // _COLUMNS),)
        _weight_kernel[grid](
            dy.values, x.values, dy.values.stride(0), x.values.stride(0), dy.scales, x.scales, *dy.scales.stride(),
            *x.scales.stride(), out_EOK, groups.start_E, groups.count_E, o, k, COLUMNS=_COLUMNS, num_warps=8,
            num_stages=3,
        )  # fmt: skip
        return out_EOK
    return out_EOK.zero_()


def grouped_weight_gemm_reference(dy: Fp8, x: Fp8, groups: Groups) -> Tensor:
    """The definition: everything dequantised, fp32 products, one expert at a time."""
    dy_OR, x_KR = (dequantize(v, s.contiguous(), torch.float32, ACTIVATION_BLOCK) for v, s in (dy, x))
    ranges = zip(groups.start_E.tolist(), groups.count_E.tolist(), strict=True)
    return torch.stack([dy_OR[:, s : s + n] @ x_KR[:, s : s + n].T for s, n in ranges])

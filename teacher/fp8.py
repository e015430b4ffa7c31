"""DeepSeek's block FP8: e4m3 values, and one fp32 scale for each block, by which they are multiplied back.

DeepSeek-V3 section 3.3.2: weights in blocks of 128 x 128, activations in tiles of 1 x 128 along the inner dimension,
scale = amax / 448 of the block at hand. Plain torch: the definition that kernels are tested against, and what runs
where they cannot. A last block may be ragged; its scale is that of the values it has (README_WEIGHTS of DeepSeek-V3).
transformers 5.19, where it dequantises (on a CPU), takes the rows divided by the number of scales for the block: V3's
own kv_a_proj_with_mqa of 576 rows in 5 blocks it refuses, and 240 rows in 2 blocks it reads wrongly.

Shapes: R rows, C columns, r = ceil(R / block rows), c = ceil(C / block columns).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # e4m3's largest finite value
WEIGHT_BLOCK = (128, 128)
ACTIVATION_BLOCK = (1, 128)
# Values dequantised at a time, whatever the size of the tensor: 1 MiB of fp32 stays in a CPU's cache; a GPU gets 64.
_STRIP = 2**18


def scale_shape(shape: tuple[int, ...] | list[int], block: tuple[int, int] = WEIGHT_BLOCK) -> list[int]:
    """Shape of the scales of a tensor of `shape` (..., R, C): (..., r, c)."""
    return [*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])]


def quantize(x_RC: Tensor, block: tuple[int, int] = WEIGHT_BLOCK, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Values (R, C) in e4m3 and scales (r, c) in fp32, so that values * scale gives `x_RC` back.

    `power_of_two` rounds scales up to powers of two (ue8m0, as V3.1 and DeepGEMM on Blackwell use them), which
    makes the multiplication back exact. A block of zeros gets the scale 1. Values that are not finite make their
    block's scale not finite. The error of a value is at most half a step of e4m3: 2^-4 of it, or 2^-10 of its scale.
    """
    rows, columns = x_RC.shape
    r, c = scale_shape(x_RC.shape, block)
    padded = F.pad(x_RC.float(), (0, c * block[1] - columns, 0, r * block[0] - rows))
    blocks = padded.view(r, block[0], c, block[1])
    amax_rc = blocks.abs().amax(dim=(1, 3))
    # By a tensor: divided by a number, torch on CUDA multiplies by its reciprocal, which is not always the same.
    scale_rc = (amax_rc / amax_rc.new_full((), FP8_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    if power_of_two:
        mantissa_rc, exponent_rc = torch.frexp(scale_rc)  # mantissa in [0.5, 1)
        scale_rc = torch.ldexp(torch.ones_like(scale_rc), exponent_rc - (mantissa_rc == 0.5).int())
        scale_rc = torch.where(amax_rc.isfinite(), scale_rc, amax_rc)
    scale_rc = torch.where(amax_rc == 0, 1.0, scale_rc)
    # The clamp is for scales so small that the quotient rounds above 448, which e4m3 would turn into NaN.
    values = (blocks / scale_rc[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    return values.view(padded.shape)[:rows, :columns].to(FP8), scale_rc


def decode(values: Tensor) -> Tensor:
    """e4m3 to fp32. On a CPU through a table of the 256 codes: torch's own cast takes eight times as long."""
    if values.device.type != "cpu":
        return values.float()
    table = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    return table.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)


def dequantize(
    values_RC: Tensor,
    scale_rc: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    block: tuple[int, int] = WEIGHT_BLOCK,
    out_RC: Tensor | None = None,
) -> Tensor:
    """Multiply e4m3 values by their scales in fp32 and round once to `dtype`, or into `out_RC` in its dtype.

    Works strip by strip, so that nothing of the tensor's size is held beside input and result.
    """
    rows, columns = values_RC.shape
    assert list(scale_rc.shape) == scale_shape(values_RC.shape, block)
    if out_RC is None:
        out_RC = torch.empty(rows, columns, dtype=dtype, device=values_RC.device)
    scale_rC = scale_rc.float().repeat_interleave(block[1], dim=1)[:, :columns]
    whole = rows - rows % block[0]
    strip_size = _STRIP if values_RC.device.type == "cpu" else 64 * _STRIP
    step = block[0] * max(1, strip_size // (block[0] * columns))
    edges = [*range(0, whole, step), whole] + ([rows] if whole < rows else [])
    for start, stop in pairwise(edges):
        strip_scale = scale_rC[start // block[0] : -(-stop // block[0])]
        strip = decode(values_RC[start:stop]).view(len(strip_scale), -1, columns).mul_(strip_scale.unsqueeze(1))
        out_RC[start:stop] = strip.view(stop - start, columns)
    return out_RC

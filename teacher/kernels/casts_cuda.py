"""The casts in CUDA (cuda/casts.cu, casts_transposed.cu and casts_again.cu): `teacher.kernels.quantize` gives them what
they take and keeps the rest for Triton.

Both are bit-exact, so which of the two ran shows in nothing but time. Taken are tensors on Hopper whose rows begin at
multiples of 16 bytes, with a multiple of 8 columns and, where the result is transposed, of 16 rows; where the libraries
cannot be built (`teacher.kernels.cuda.build`), none.

Shapes as in teacher.kernels.quantize.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from teacher.kernels.arguments import INTERPRETED
from teacher.kernels.cuda.build import call, library

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "casts_rows": ("casts", (_P, _L, _I, _P, _P, _P, _L, _I, _I, _I, _P)),
    "casts_blocks": ("casts", (_P, _L, _L, _I, _P, _P, _I, _I, _I, _I, _P)),
    "casts_transposed": ("casts_transposed", (_P, _L, _L, _I, _P, _P, _P, _P, _L, _I, _I, _I, _I, _I, _P)),
    "casts_again": ("casts_again", (_P, _P, _L, _L, _P, _P, _I, _I, _I, _P)),
}
_FILES = sorted({file for file, _ in _SIGNATURES.values()})
COLUMNS, BLOCKS, BLOCKS_TWICE, BOTH_WAYS = range(4)


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why nothing is cast in CUDA on `device`; None where it is."""
    if INTERPRETED or device.type != "cuda":
        return "Triton's interpreter runs the casts" if INTERPRETED else f"tensors are on {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"compute capability {capability[0]}.{capability[1]}; the casts in CUDA are for 9.0 (Hopper)"
    return next((made for made in map(library, _FILES) if isinstance(made, str)), None)


def takes(x: Tensor, transposed: bool) -> bool:
    """Whether `x`, (R, C) or (E, R, C) with rows of stride 1, is cast in CUDA."""
    if obstacle(x.device) is not None:
        return False
    size, (rows, columns) = x.element_size(), x.shape[-2:]
    steps = [x.data_ptr(), *(stride * size for stride in x.stride()[:-1])]
    return columns % 8 == 0 and not (transposed and rows % 16) and all(step % 16 == 0 for step in steps)


def rows(
    x: Tensor, source: Tensor | None, values: Tensor, scales: Tensor, scale_stride: int, power_of_two: bool
) -> None:
    """Tiles of 1 x 128 of x, or of its rows `source`."""
    _call(
        x, "casts_rows", x.data_ptr(), x.stride(0), _TYPES[x.dtype], None if source is None else source.data_ptr(),
        values.data_ptr(), scales.data_ptr(), scale_stride, *values.shape, power_of_two,
    )  # fmt: skip


def blocks(x: Tensor, values: Tensor, scales: Tensor, power_of_two: bool) -> None:
    """Blocks of 128 x 128 of each matrix."""
    _call(
        x, "casts_blocks", x.data_ptr(), *_strides(x), _TYPES[x.dtype], values.data_ptr(), scales.data_ptr(),
        *_sizes(x), power_of_two,
    )  # fmt: skip


def transposed(
    x: Tensor, form: int, values_t: Tensor, scales_t: Tensor, values: Tensor | None, scales: Tensor | None,
    scale_stride: int, power_of_two: bool,
) -> None:  # fmt: skip
    """`form`: COLUMNS and BLOCKS write the transpose alone; BLOCKS_TWICE also blocks as they lie, BOTH_WAYS also tiles
    of 1 x 128, whose columns of scales are `scale_stride` apart."""
    _call(
        x, "casts_transposed", x.data_ptr(), *_strides(x), _TYPES[x.dtype], values_t.data_ptr(), scales_t.data_ptr(),
        None if values is None else values.data_ptr(), None if scales is None else scales.data_ptr(), scale_stride,
        *_sizes(x), form, power_of_two,
    )  # fmt: skip


def again(x: Tensor, x_scales: Tensor, values_t: Tensor, scales_t: Tensor, power_of_two: bool) -> None:
    """Tiles of 1 x 128 to tiles of 128 x 1, transposed."""
    _call(
        x, "casts_again", x.data_ptr(), x_scales.data_ptr(), *x_scales.stride(), values_t.data_ptr(),
        scales_t.data_ptr(), *x.shape, power_of_two,
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int]:
    return (x.stride(0) if x.dim() == 3 else 0), x.stride(-2)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return (x.shape[0] if x.dim() == 3 else 1), x.shape[-2], x.shape[-1]


@functools.cache
def _function(name: str) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    file, signature = _SIGNATURES[name]
    made = library(file)
    assert not isinstance(made, str), made
    function = getattr(made, name)
    function.argtypes, function.restype = signature, ctypes.c_int
    return function


def _call(x: Tensor, name: str, *arguments: object) -> None:
    with torch.cuda.device(x.device):
        call(_function(name), *arguments, torch.cuda.current_stream(x.device).cuda_stream)

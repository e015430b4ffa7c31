"""The grouped product for many rows in CUDA (cuda/grouped_gemm.cu): operands shared by two blocks, stores by TMA.

`teacher.kernels.grouped_gemm` says what is computed and what the floors are, the source how. One launch, which finds
its tiles itself. The library is compiled once a machine; where it cannot be, `missing` says why, and `grouped_gemm`
takes the Gluon kernel with the rest of the tile.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from teacher.kernels.cuda.build import call, library
from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.tuning import Tile

SHARED = ("nothing", "matrix", "rows")  # by two blocks of a cluster
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


@functools.cache
def missing() -> str | None:
    """Why the kernel cannot be had on this machine; None where it can."""
    found = library("grouped_gemm")
    return found if isinstance(found, str) else None


@functools.cache
def _function() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    found = library("grouped_gemm")
    assert not isinstance(found, str), found
    function = found.grouped_gemm
    function.argtypes = [_POINTER, _POINTER, _LONG, *[_POINTER] * 5, *[_INT] * 8, _POINTER]
    function.restype = _INT
    return function


def launch(x: Fp8, w: Fp8, groups: Groups, out: Tensor, tile: Tile) -> None:
    """Operands are checked already; ValueError for what the kernel does not have."""
    if tile.cuda not in SHARED:
        raise ValueError(f"tile is {tile}; for cuda taken: one of {SHARED}")
    if (reason := missing()) is not None:
        raise ValueError(f"tile is {tile}, but there is no kernel in CUDA here: {reason}")
    for name, each in (("x.values", x.values), ("w.values", w.values)):
        if each.data_ptr() % 16:
            raise ValueError(f"{name} begins at address {each.data_ptr()}; taken: a multiple of 16 (TMA)")
    (rows, k), (experts, n, _) = x.values.shape, w.values.shape
    group = max(1, tile.group // 2) if tile.cuda == "matrix" else tile.group  # the kernel counts pairs there
    call(
        _function(), x.values.data_ptr(), x.scales.data_ptr(), x.scales.stride(1), w.values.data_ptr(),
        w.scales.data_ptr(), out.data_ptr(), groups.start_E.data_ptr(), groups.count_E.data_ptr(), experts, rows, n, k,
        out.dtype == torch.float32, SHARED.index(tile.cuda), group, out.device.index,
        torch.cuda.current_stream(out.device).cuda_stream,
    )  # fmt: skip

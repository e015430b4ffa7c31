"""Launching cuda/mla_decode.cu: MLA decode for Hopper where Triton's kernel is slow, and when that is.

Triton holds one program of 64 queries on an SM, whose products wait for its softmax; in CUDA two warp groups take turns
(mla_decode_64.cuh). It converts FP8 by way of shared memory, a byte at a time; in CUDA a code goes from where it lies
to its operand (mla_decode_16.cuh). Up to 16 queries of a sequence over a bf16 cache are bound by bytes, and Triton
reads them at the bandwidth.

Shapes: see mla_decode.py.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math

import torch
from torch import Tensor

from teacher.kernels.arguments import INTERPRETED
from teacher.kernels.cuda.build import call, library

TILE = 64  # keys
_FEW_TILES = 264  # two a processor
_log = logging.getLogger(__name__)


class _Arguments(ctypes.Structure):
    """Arguments of cuda/mla_arguments.cuh."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("latent", "rope", "cache", "table", "position", "first", "out", "lse")]
        + [(name, ctypes.c_int64) for name in ("latent_b", "latent_t", "latent_h", "rope_b", "rope_t", "rope_h")]
        + [(name, ctypes.c_int64) for name in ("table_b", "cache_rows")]
        + [("scale", ctypes.c_float)]
        + [(name, ctypes.c_int) for name in ("rows", "tokens", "heads", "splits")]
        + [(name, ctypes.c_int) for name in ("page_tiles", "wide", "aligned", "out_float")]
    )


def obstacle(q_latent_BTHR: Tensor, q_rope_BTHD: Tensor, cache_PGW: Tensor, out: Tensor) -> str | None:
    """Why the CUDA kernel cannot take tensors that `mla_decode` has checked, or None."""
    if INTERPRETED or cache_PGW.device.type != "cuda":
        return "it runs on a GPU alone"
    if torch.cuda.get_device_capability(cache_PGW.device)[0] != 9:
        return "it is Hopper's"
    rank, rope, page = q_latent_BTHR.shape[-1], q_rope_BTHD.shape[-1], cache_PGW.shape[1]
    if (rank, rope) != (512, 64) or page % TILE:
        return f"it takes sizes of 512 + 64 and pages of a multiple of {TILE}, not {rank} + {rope} and {page}"
    if out.dtype not in (torch.bfloat16, torch.float32) or cache_PGW.data_ptr() % 16 or out.data_ptr() % 16:
        return "it takes bf16 or fp32 results, and a cache that starts at 16 bytes"
    built = _library()
    return built if isinstance(built, str) else None


def preferred(fp8: bool, queries: int, tiles: int) -> bool:
    """Whether the CUDA kernels are faster, as measured on an H200, at so many queries of a sequence and `tiles` of 64
    keys in all sequences together: they gain with each tile, and take up to 10 microseconds longer to start and merge.
    """
    return (fp8 or queries > 16) and tiles * -(-queries // 64) > _FEW_TILES


def queries_of_program(fp8: bool, queries: int) -> int:
    return 16 if fp8 and queries <= 16 else 64


def launch(
    q_latent_BTHR: Tensor, q_rope_BTHD: Tensor, cache_PGW: Tensor, table_BP: Tensor, position_BT: Tensor, scale: float,
    first_B: Tensor | None, out: Tensor, splits: int, block_m: int,
) -> None:  # fmt: skip
    """Attend with `block_m` queries a program into `out`; arguments as of `mla_decode`, which has checked them."""
    built = _library()
    assert isinstance(built, ctypes.CDLL)
    fp8 = cache_PGW.dtype == torch.uint8
    rows, tokens, heads, rank = q_latent_BTHR.shape
    strides = (*q_latent_BTHR.stride()[:3], *q_rope_BTHD.stride()[:3])
    starts = q_latent_BTHR.data_ptr() | q_rope_BTHD.data_ptr()
    wide = [index is not None and index.dtype == torch.int64 for index in (table_BP, position_BT, first_B)]
    parts, lse = out, None
    if splits > 1:
        parts = torch.empty(rows, splits, tokens * heads, rank, dtype=torch.float32, device=out.device)
        lse = torch.empty(rows, splits, tokens * heads, dtype=torch.float32, device=out.device)
    arguments = _Arguments(
        q_latent_BTHR.data_ptr(), q_rope_BTHD.data_ptr(), cache_PGW.data_ptr(), table_BP.data_ptr(),
        position_BT.data_ptr(), None if first_B is None else first_B.data_ptr(), parts.data_ptr(),
        None if lse is None else lse.data_ptr(), *strides, table_BP.stride(0),
        cache_PGW.shape[0] * cache_PGW.shape[1], scale * math.log2(math.e), rows, tokens, heads, splits,
        cache_PGW.shape[1] // TILE, sum(bit << i for i, bit in enumerate(wide)),
        int(starts % 16 == 0 and all(stride % 8 == 0 for stride in strides)), int(parts.dtype == torch.float32),
    )  # fmt: skip
    stream = ctypes.c_void_p(torch.cuda.current_stream(cache_PGW.device).cuda_stream)
    attend = getattr(built, f"mla_decode_{'fp8' if fp8 else 'bf16'}_{block_m}")
    with torch.cuda.device(cache_PGW.device):
        call(attend, ctypes.byref(arguments), stream)
        if splits > 1:
            as_float = int(out.dtype == torch.float32)
            call(built.mla_merge, ctypes.byref(arguments), ctypes.c_void_p(out.data_ptr()), as_float, stream)


@functools.cache
def _library() -> ctypes.CDLL | str:
    built = library("mla_decode")
    if isinstance(built, str):
        _log.warning(
            "MLA decode by Triton's kernel alone, slower in FP8 and from 17 queries of a sequence on: %s", built
        )
    else:
        _log.info("MLA decode: the CUDA kernel for Hopper where it is faster than Triton's")
    return built

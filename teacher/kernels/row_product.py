"""A few rows times one matrix, cut along the inner dimension too: what a decoding step does in every linear layer.

With few rows a product costs the reading of its matrix, and one of 1,536 x 7,168 has only 24 tiles of 64 rows: too few
to keep 132 multiprocessors reading. So the inner dimension is cut into `splits` parts, and the sums of each are left
side by side in fp32: (S, N, O). Whoever reads them next (a norm, the router, the cache's writer) adds them on the way,
in their order, so that the same input gives the same bits, without atomics and without a launch for it.

Floors, for N rows and an O x K matrix: O K bytes in FP8 (2 O K in bf16), 2 N O K FLOP; 8 S N O bytes for the parts,
written and read.

The product is taken transposed (64 rows of the matrix are the instruction's rows, tokens its free dimension), as in
grouped_gemm; in FP8 each block of 128 is scaled and added in fp32.

Shapes: N rows, O outputs, K inputs, S splits; k and o in blocks of 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from teacher.fp8 import ACTIVATION_BLOCK, FP8, dequantize
from teacher.kernels.arguments import INTERPRETED, multiprocessors, same_device, take
from teacher.kernels.operands import Fp8
from teacher.kernels.rms_norm import to_bf16

MOST_ROWS = 256
_COLUMNS, _STEP = 64, 128


@triton.jit(do_not_specialize=["x_scale_stride", "N", "each"])
def _product_kernel(
    x_rows, w_rows, x_scales, x_scale_stride, w_scales, out, N, outputs, K, each,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, QUANTISED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of COLUMNS outputs and ROWS rows over `each` steps of the inner dimension."""
    column, split = tl.program_id(0) * COLUMNS, tl.program_id(1)
    row = tl.program_id(2) * ROWS
    steps = tl.cdiv(K, STEP)
    token, output = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for k in tl.range(split * each, tl.minimum((split + 1) * each, steps)):
        w = w_rows.load([column, k * STEP])
        x = x_rows.load([row, k * STEP])
        if QUANTISED:
            w_scale = tl.load(w_scales + column // STEP * steps + k)
            x_scale = tl.load(x_scales + k * x_scale_stride + token, mask=token < N, other=0.0)
            total += tl.dot(w, x.T) * (x_scale * w_scale)[None, :]
        else:
            if INTERPRETED:  # its products in bf16 are wrong
                w, x = w.to(tl.float32), x.to(tl.float32)
            total += tl.dot(w, x.T)
    place = out + (split.to(tl.int64) * N + token[:, None]) * outputs + output[None, :]
    total = tl.trans(total)
    if out.dtype.element_ty == tl.bfloat16:
        total = to_bf16(total, INTERPRETED)
    tl.store(place, total, mask=(token < N)[:, None] & (output < outputs)[None, :])


def row_product(
    x: Fp8 | Tensor, w: Fp8 | Tensor, splits: int | None = None, out: torch.dtype = torch.float32
) -> Tensor:
    """x W^T for at most `MOST_ROWS` rows: parts (S, N, O) in fp32; a single one is in the dtype `out`.

    Both in FP8 (x (N, K) with scales (N, k) of stride 1 along the rows, w (O, K) with (o, k)) or both in bf16. At most
    `splits` parts are made; None chooses. Raises ValueError for what it cannot take.
    """
    quantised = isinstance(w, Fp8)
    if isinstance(x, Fp8) != quantised:
        raise ValueError(f"x is {type(x).__name__}, w {type(w).__name__}; taken: both in FP8, or both in bf16")
    x_NK, w_OK = (x.values, w.values) if isinstance(x, Fp8) and isinstance(w, Fp8) else (x, w)
    assert isinstance(x_NK, Tensor) and isinstance(w_OK, Tensor)
    dtypes = (FP8,) if quantised else (torch.bfloat16,)
    take("x", x_NK, dtypes, (2,), contiguous=True)
    take("w", w_OK, dtypes, (2,), contiguous=True)
    same_device(x=x_NK, w=w_OK)
    (rows, k), outputs = x_NK.shape, len(w_OK)
    if w_OK.shape[1] != k or k % 16:
        raise ValueError(f"x has {k} columns, w {w_OK.shape[1]}; taken: the same, and a multiple of 16 (TMA)")
    if rows > MOST_ROWS:
        raise ValueError(f"x has {rows} rows; taken: at most {MOST_ROWS}")
    x_scales = w_scales = x_NK
    if isinstance(x, Fp8) and isinstance(w, Fp8):
        x_scales, w_scales = x.scales, w.scales
        for name, scales, wanted in (
            ("x.scales", x_scales, [rows, -(-k // 128)]), ("w.scales", w_scales, [-(-outputs // 128), -(-k // 128)])
        ):  # fmt: skip
            if scales.dtype != torch.float32 or list(scales.shape) != wanted:
                raise ValueError(f"{name} is {scales.dtype} of shape {list(scales.shape)}; taken: float32 of {wanted}")
        if rows > 1 and x_scales.stride(0) != 1:
            raise ValueError(f"x.scales has strides {list(x_scales.stride())}; taken: stride 1 along the rows")
    steps, tile_rows = -(-k // _STEP), min(128, max(16, triton.next_power_of_2(rows)))
    tiles = -(-outputs // _COLUMNS) * -(-rows // tile_rows)
    if splits is None:
        splits = choose_splits(tiles, steps, multiprocessors(x_NK.device), tile_rows)
    each = -(-steps // splits)
    splits = -(-steps // each)
    dtype = out if splits == 1 else torch.float32
    parts_SNO = torch.empty(splits, rows, outputs, dtype=dtype, device=x_NK.device)
    if parts_SNO.numel():
        _product_kernel[(-(-outputs // _COLUMNS), splits, -(-rows // tile_rows))](
            TensorDescriptor.from_tensor(x_NK, [tile_rows, _STEP]),
            TensorDescriptor.from_tensor(w_OK, [_COLUMNS, _STEP]),
            x_scales, x_scales.stride(1) if quantised else 0, w_scales, parts_SNO, rows, outputs, k, each,
            ROWS=tile_rows, COLUMNS=_COLUMNS, STEP=_STEP, QUANTISED=quantised, INTERPRETED=INTERPRETED,
            num_warps=4,
            num_stages=(5 if tile_rows <= 32 else 4) if quantised else 3,
        )  # fmt: skip
    return parts_SNO


def choose_splits(tiles: int, steps: int, processors: int, tile_rows: int = 16) -> int:
    """Some programs a multiprocessor, fewer where their tiles are large, each of at least four steps. Measured on an
    H200: docs/r1-layer.md."""
    wanted = processors * (5 if tile_rows <= 64 else 3) // 2
    return max(1, min((wanted + tiles // 2) // tiles, steps // 4))


def row_product_reference(x: Fp8 | Tensor, w: Fp8 | Tensor) -> Tensor:
    """The definition, (N, O): everything in fp32."""
    if isinstance(x, Fp8) and isinstance(w, Fp8):
        x_NK = dequantize(x.values, x.scales.contiguous(), torch.float32, ACTIVATION_BLOCK)
        return x_NK @ dequantize(w.values, w.scales, torch.float32).t()
    assert isinstance(x, Tensor) and isinstance(w, Tensor)
    return x.float() @ w.float().t()

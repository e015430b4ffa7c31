"""Grouped FP8 products: rows that lie expert by expert, times each expert's matrix, block scales, fp32 sums.

`grouped_gemm` gives x W^T, and `grouped_swiglu` silu(x G^T) * (x U^T) requantised in tiles of 1 x 128, so that between
the two products of an expert layer nothing wider than a byte a value is written.

Floors, for R rows in all, E experts that have rows, N x K matrices (for SwiGLU, N = 2 I):
- arithmetic: 2 R N K FLOP, at 1,979 TFLOP/s (dense e4m3, by the datasheet);
- bytes: E N K of weights + R K of rows + R N 2 (bf16; SwiGLU: R I), and a 128th of it in scales.
With R1's sizes an expert turns from bytes to arithmetic at about 230 rows: below that a step costs its weights, 29 MB
for gate and up and 15 MB for down, and what counts is how many bytes are in flight; above it, how seldom the tensor
cores wait.

Precision. Hopper's tensor cores add e4m3 products with about 14 bits, so a sum of 128 products (one block of scales)
is taken at a time and added, scaled, in fp32 on the ordinary cores (DeepSeek-V3 section 3.3.2).

Layouts. `Groups` names the first row and the number of rows of every expert: contiguous (starts follow each other, no
padding needed), contiguous with gaps, or masked (starts are multiples of a capacity): one kernel takes them all. Tiles
that reach over an expert's last row read its neighbour's and drop the result; rows of no expert are never written.

Schedule. Programs are as many as fit the chip and take tiles in turn, expert by expert; inside an expert GROUP row
tiles take turns over all columns, so that what runs at one time shares operands in the L2. Operands arrive by TMA. A
program's tile is `rows` x (`halves` * `columns`), where the halves are neighbours or, for SwiGLU, gate and up of the
same columns: the tile of x is read once for both. With few rows the product is taken transposed (`swap`): the
instruction's 64 rows are then weights, and tokens its free dimension from 8 on.

Shapes: R rows, E experts, N and K columns of output and input, I = N / 2 for SwiGLU; r, n, k, i in blocks of 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from teacher.fp8 import ACTIVATION_BLOCK, FP8, dequantize, quantize
from teacher.kernels.arguments import INTERPRETED, multiprocessors, same_device, take
from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.quantize import block_scale, encode, magnitude
from teacher.kernels.tuning import Tile, tile_for


@triton.jit
def _grouped_kernel(
    x_rows, w_rows, x_scales, x_scale_stride, w_scales, out, out_scales, out_scale_stride, start_E, count_E, E, N, K,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, SWIGLU: tl.constexpr,
    SWAP: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """N counts the columns of `out`: for SwiGLU a matrix has 2 N rows, gate's and then up's."""
    BLOCK: tl.constexpr = 128
    expert = tl.arange(0, EXPERTS)
    row_tiles_E = tl.cdiv(tl.load(count_E + expert, mask=expert < E, other=0), ROWS)
    column_tiles = tl.cdiv(N, COLUMNS if SWIGLU else COLUMNS * HALVES)
    ends_E = tl.cumsum(row_tiles_E) * column_tiles
    matrix_rows = N * 2 if SWIGLU else N
    scale_rows = tl.cdiv(N, BLOCK) * 2 if SWIGLU else tl.cdiv(N, BLOCK)
    k_tiles = tl.cdiv(K, BLOCK)
    total = tl.sum(row_tiles_E) * column_tiles
    for tile in tl.range(tl.program_id(0), total, PROGRAMS):
        done_E = ends_E <= tile
        e = tl.sum(done_E.to(tl.int32))
        start, count = tl.load(start_E + e), tl.load(count_E + e)
        local = tile - tl.sum(tl.where(done_E, row_tiles_E, 0)) * column_tiles
        first = local // (GROUP * column_tiles) * GROUP
        height = tl.minimum(tl.cdiv(count, ROWS) - first, GROUP)
        within = local % (GROUP * column_tiles)
        row = (first + within % height) * ROWS
        column = within // height * (COLUMNS if SWIGLU else COLUMNS * HALVES)

        token = row + tl.arange(0, ROWS)
        real = token < count
        x_scale_at = x_scales + start + token
        other = column + (N if SWIGLU else COLUMNS)
        scale_at = w_scales + (e * scale_rows + column // BLOCK) * k_tiles
        other_block = tl.cdiv(N, BLOCK) + column // BLOCK if SWIGLU else tl.minimum(other, N - 1) // BLOCK
        other_scale_at = w_scales + (e * scale_rows + other_block) * k_tiles
        w_row = e * matrix_rows + column
        other_row = e * matrix_rows + other
        if SWAP:
            a = tl.zeros([COLUMNS, ROWS], tl.float32)
            b = tl.zeros([COLUMNS, ROWS], tl.float32)
        else:
            a = tl.zeros([ROWS, COLUMNS], tl.float32)
            b = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.range(0, k_tiles):
            x = x_rows.load([start + row, k * BLOCK])
            w = w_rows.load([w_row, k * BLOCK])
            w_scale = tl.load(scale_at + k)
            x_scale = tl.load(x_scale_at + k * x_scale_stride, mask=real, other=0.0)
            if SWAP:
                a += tl.dot(w, x.T) * (x_scale * w_scale)[None, :]
            else:
                a += tl.dot(x, w.T) * (x_scale * w_scale)[:, None]
            if HALVES == 2:
                w = w_rows.load([other_row, k * BLOCK])
                w_scale = tl.load(other_scale_at + k)
                if SWAP:
                    b += tl.dot(w, x.T) * (x_scale * w_scale)[None, :]
                else:
                    b += tl.dot(x, w.T) * (x_scale * w_scale)[:, None]

        if SWAP:
            a, b = tl.trans(a), tl.trans(b)
        out_column = column + tl.arange(0, COLUMNS)
        place = out + (start + token).to(tl.int64)[:, None] * N
        inside = real[:, None] & (out_column < N)[None, :]
        if SWIGLU:
            hidden = tl.where(inside, a * tl.sigmoid(a) * b, 0.0)
            scale = block_scale(tl.max(magnitude(hidden), axis=1), False)
            tl.store(place + out_column[None, :], encode(hidden, scale[:, None], INTERPRETED), mask=inside)
            tl.store(out_scales + column // BLOCK * out_scale_stride + start + token, scale, mask=real)
        else:
            tl.store(place + out_column[None, :], a.to(out.dtype.element_ty), mask=inside)
            if HALVES == 2:
                out_column += COLUMNS
                inside = real[:, None] & (out_column < N)[None, :]
                tl.store(place + out_column[None, :], b.to(out.dtype.element_ty), mask=inside)


def grouped_gemm(x: Fp8, w: Fp8, groups: Groups, out_RN: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """Rows of x times their expert's matrix, transposed: (R, N) in bf16, or in `out_RN`'s dtype, bf16 or fp32.

    Rows that belong to no group are left as they are.
    """
    rows, experts, n, k = _sizes(x, w, groups)
    if out_RN is None:
        out_RN = torch.empty(rows, n, dtype=torch.bfloat16, device=x.values.device)
    take("out_RN", out_RN, (torch.bfloat16, torch.float32), (2,), contiguous=True)
    if list(out_RN.shape) != [rows, n]:
        raise ValueError(f"out_RN has shape {list(out_RN.shape)}; taken: {[rows, n]}")
    _launch(x, w, groups, out_RN, None, n, tile or tile_for("gemm", n, k, rows, experts, out_RN.device))
    return out_RN


def grouped_swiglu(x: Fp8, w: Fp8, groups: Groups, out: Fp8 | None = None, tile: Tile | None = None) -> Fp8:
    """silu(x G^T) * (x U^T) in FP8, (R, I) and (R, i): w holds G's I rows and then U's, its scales G's i and U's i.

    Rows that belong to no group are left as they are. Scales are stored column by column.
    """
    rows, experts, n, k = _sizes(x, w, groups, swiglu=True)
    if out is None:
        values = torch.empty(rows, n, dtype=FP8, device=x.values.device)
        scales = torch.empty(-(-n // 128), -(-rows // 4) * 4, dtype=torch.float32, device=x.values.device)
        out = Fp8(values, scales[:, :rows].t())
    take("out.values", out.values, (FP8,), (2,), contiguous=True)
    if list(out.values.shape) != [rows, n]:
        raise ValueError(f"out.values has shape {list(out.values.shape)}; taken: {[rows, n]}")
    _check_row_scales("out.scales", out.scales, rows, n)
    chosen = tile or tile_for("swiglu", n, k, rows, experts, out.values.device)
    if chosen.columns != 128 or chosen.halves != 2:
        raise ValueError(f"tile is {chosen}; for SwiGLU taken: columns 128 (a block of scales) and halves 2 (gate, up)")
    _launch(x, w, groups, out.values, out.scales, n, chosen)
    return out


def grouped_gemm_reference(x: Fp8, w: Fp8, groups: Groups) -> Tensor:
    """The definition: everything dequantised, fp32 products, one expert at a time; rows of no group are NaN."""
    x_RK = dequantize(x.values, x.scales.contiguous(), torch.float32, ACTIVATION_BLOCK)
    out_RN = x_RK.new_full((len(x_RK), w.values.shape[1]), float("nan"))
    for e, (start, count) in enumerate(zip(groups.start_E.tolist(), groups.count_E.tolist(), strict=True)):
        matrix = dequantize(w.values[e], w.scales[e], torch.float32)
        out_RN[start : start + count] = x_RK[start : start + count] @ matrix.t()
    return out_RN


def grouped_swiglu_reference(x: Fp8, w: Fp8, groups: Groups) -> Fp8:
    """The definition of `grouped_swiglu`; rows of no group have NaN for scales."""
    inner = w.values.shape[1] // 2
    blocks = -(-inner // 128)
    gate_RI, up_RI = (
        grouped_gemm_reference(
            x, Fp8(w.values[:, half * inner :][:, :inner], w.scales[:, half * blocks :][:, :blocks]), groups
        )
        for half in (0, 1)
    )
    return Fp8(*quantize(F.silu(gate_RI) * up_RI, ACTIVATION_BLOCK))


def _sizes(x: Fp8, w: Fp8, groups: Groups, swiglu: bool = False) -> tuple[int, int, int, int]:
    """Rows, experts, columns of the output and of the input; ValueError for what the kernel cannot take."""
    take("x.values", x.values, (FP8,), (2,), contiguous=True)
    take("w.values", w.values, (FP8,), (3,), contiguous=True)
    take("w.scales", w.scales, (torch.float32,), (3,), contiguous=True)
    take("start_E", groups.start_E, (torch.int32,), (1,), contiguous=True)
    take("count_E", groups.count_E, (torch.int32,), (1,), contiguous=True)
    same_device(x=x.values, x_scales=x.scales, w=w.values, w_scales=w.scales, start_E=groups.start_E)
    (rows, k), (experts, matrix_rows, w_k) = x.values.shape, w.values.shape
    if k != w_k or k % 16:
        raise ValueError(f"x.values has {k} columns, w.values {w_k}; taken: the same, and a multiple of 16 (TMA)")
    if swiglu and matrix_rows % 2:
        raise ValueError(f"w.values has {matrix_rows} rows a matrix; taken: an even number, gate's and up's")
    n = matrix_rows // 2 if swiglu else matrix_rows
    wanted = [experts, -(-n // 128) * (2 if swiglu else 1), -(-k // 128)]
    if list(w.scales.shape) != wanted:
        raise ValueError(f"w.scales has shape {list(w.scales.shape)}; taken: {wanted}, a scale for each 128 x 128")
    for name, each in (("start_E", groups.start_E), ("count_E", groups.count_E)):
        if len(each) != experts:
            raise ValueError(f"{name} has {len(each)} values; taken: one for each of w's {experts} experts")
    if experts * matrix_rows >= 2**31 or rows >= 2**31:
        raise ValueError(f"{rows} rows and {experts} x {matrix_rows} rows of matrices; taken: fewer than 2^31 of each")
    _check_row_scales("x.scales", x.scales, rows, k)
    return rows, experts, n, k


def _check_row_scales(name: str, scales: Tensor, rows: int, columns: int) -> None:
    """Scales of rows are read down the rows: (R, k) with stride 1 along R, as `quantize_activations` gives them."""
    wanted = [rows, -(-columns // 128)]
    if scales.dtype != torch.float32 or list(scales.shape) != wanted:
        raise ValueError(f"{name} is {scales.dtype} of shape {list(scales.shape)}; taken: float32 of shape {wanted}")
    if rows > 1 and scales.stride(0) != 1:
        raise ValueError(f"{name} has strides {list(scales.stride())}; taken: stride 1 along the rows")


def _launch(x: Fp8, w: Fp8, groups: Groups, out: Tensor, out_scales: Tensor | None, n: int, tile: Tile) -> None:
    rows, k = x.values.shape
    if tile.columns not in (64, 128) or tile.halves not in (1, 2):
        raise ValueError(f"tile is {tile}; taken: columns 64 or 128 (one scale a block) and halves 1 or 2")
    if rows == 0 or n == 0:
        return
    experts = w.values.shape[0]
    programs = multiprocessors(out.device) * tile.resident
    if tile.specialize:
        from teacher.kernels import grouped_gemm_hopper

        grouped_gemm_hopper.launch(x, w, groups, out, out_scales, n, tile, programs)
        return
    _grouped_kernel[(programs,)](
        TensorDescriptor.from_tensor(x.values, [tile.rows, 128]),
        TensorDescriptor.from_tensor(w.values.view(-1, k), [tile.columns, 128]),
        x.scales, x.scales.stride(1), w.scales, out, out_scales, 0 if out_scales is None else out_scales.stride(1),
        groups.start_E, groups.count_E, experts, n, k, EXPERTS=max(16, triton.next_power_of_2(experts)),
        ROWS=tile.rows, COLUMNS=tile.columns, HALVES=tile.halves, SWIGLU=out_scales is not None, SWAP=tile.swap,
        GROUP=tile.group, PROGRAMS=programs, INTERPRETED=INTERPRETED,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

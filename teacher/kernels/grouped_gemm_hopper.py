"""The grouped products for many rows, written for Hopper in Gluon: one warp loads, two groups of four multiply.

`teacher.kernels.grouped_gemm` says what is computed and what the floors are. What that kernel, in Triton proper, cannot
say is when the tensor cores may run on: each sum of 128 products must be added in fp32 on the ordinary cores, and there
all warps of a program do so together while the tensor cores wait. Here two warp groups with 64 rows each go their own
ways over the same 256 columns, so that one's addition falls into the other's product, and a warp of its own keeps the
operands coming, also across the end of a tile. The sum of a group, 64 x 256 in fp32, takes 128 registers a thread, the
product that is being added 64, so each thread is given 240, and the loading warp group 24.

A tile needs 16 KB of x and 32 KB of matrix for 128 of K, 8.4 MFLOP: at 1,200 TFLOP/s that is 7 TB/s out of the L2.
There is no interpreter for Gluon: this kernel is proved on the GPU, against the other one and both references.

Shapes: as there; T row tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.quantize import block_scale, encode, magnitude
from teacher.kernels.tuning import Tile

ROWS, COLUMNS = 128, 256  # of a tile; SwiGLU: 128 columns of gate and the same of up
_REGISTERS = 168  # a thread at the start, times 384 threads: all there are; then 240, 240 and 24


@triton.jit
def _row_tiles_kernel(start_E, count_E, table, total, E, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Each expert's row tiles, as (expert, first row, rows that are its own), in the order of the experts."""
    e = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    tiles_E = tl.cdiv(tl.load(count_E + expert, mask=expert < E, other=0), ROWS)
    place = tl.sum(tl.where(expert < e, tiles_E, 0))
    start, count = tl.load(start_E + e), tl.load(count_E + e)
    for tile in range(tl.cdiv(count, ROWS)):
        at = table + (place + tile) * 4
        tl.store(at, e)
        tl.store(at + 1, start + tile * ROWS)
        tl.store(at + 2, tl.minimum(count - tile * ROWS, ROWS))
    if e == 0:
        tl.store(total, tl.sum(tiles_E))


@gluon.jit
def _place(tile, row_tiles, column_tiles, GROUP: gl.constexpr):
    """Row and column tile: GROUP row tiles take turns over all columns."""
    within = tile % (GROUP * column_tiles)
    first = tile // (GROUP * column_tiles) * GROUP
    height = min(row_tiles - first, GROUP)
    return first + within % height, within // height


@gluon.jit
def _load(
    ring, schedule, sizes, descriptors, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, SWIGLU: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: the operands of every tile of this program, in the order in which they are multiplied."""
    x_buffer, w_buffer, full, empty = ring
    table, total = schedule
    x_rows, w_rows = descriptors
    N, column_tiles, k_tiles = sizes
    row_tiles = gl.load(total)
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, PROGRAMS):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        e, row = gl.load(table + row_tile * 4), gl.load(table + row_tile * 4 + 1)
        if SWIGLU:
            first = e * N * 2 + column_tile * 128
            second = first + N
        else:
            first = e * N + column_tile * 256
            second = first + 128
        for k in range(k_tiles):
            stage, phase = step % STAGES, step // STAGES & 1
            mbarrier.wait(empty.index(stage), phase ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, (128 + 256) * 128)
            tma.async_copy_global_to_shared(x_rows, [row, k * 128], ready, x_buffer.index(stage))
            tma.async_copy_global_to_shared(w_rows, [first, k * 128], ready, w_buffer.index(stage * 2))
            tma.async_copy_global_to_shared(w_rows, [second, k * 128], ready, w_buffer.index(stage * 2 + 1))
            step += 1


@gluon.jit
def _issue(x, w, part, never):
    """Start x w^T for 64 columns; `part`, whose value is not used, says in which registers."""
    return warpgroup_mma(x, w.permute((1, 0)), part, use_acc=never, is_async=True)


@gluon.jit
def _add(total, part, scale):
    """total + part * scale, in this place: left to LLVM, all additions sink below the last product, and with them the
    registers of every product are alive at once."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [part, scale, total], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _store(out, value, row, count, first_row, column, N):
    """64 x 64 values at `row` and `column`, of which the rows from `first_row` on below `count` are real.

    Exchanged among the threads first, so that each writes 16 bytes of a row: as the product leaves them a row's 16
    bytes come from four threads, half a sector of the L2 each time, and stores took a sixth of a tile's time (K 2048).
    """
    each: gl.constexpr = 128 // value.dtype.primitive_bitwidth
    wide: gl.constexpr = gl.BlockedLayout([1, each], [each // 2, 64 // each], [4, 1], [1, 0])
    value = gl.convert_layout(value, wide)
    local = first_row + gl.arange(0, 64, gl.SliceLayout(1, wide))
    column = column + gl.arange(0, 64, gl.SliceLayout(0, wide))
    inside = gl.expand_dims(local < count, 1) & gl.expand_dims(column < N, 0)
    gl.store(out + gl.expand_dims((row + local).to(gl.int64) * N, 1) + gl.expand_dims(column, 0), value, mask=inside)


@gluon.jit
def _multiply(
    ring, schedule, sizes, scales, outputs, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, SWIGLU: gl.constexpr,
    STAGES: gl.constexpr, FIRST_ROW: gl.constexpr,
):  # fmt: skip
    """One warp group's 64 rows of every tile: four sums of 64 x 64, two for each block of scales.

    A product is issued before the one in front of it is added, also across blocks of K, so that the tensor cores always
    have one waiting; scales are loaded a block ahead.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32])
    x_buffer, w_buffer, full, empty = ring
    table, total = schedule
    N, column_tiles, k_tiles = sizes
    x_scales, x_scale_stride, w_scales = scales
    out, out_scales, out_scale_stride = outputs
    row_tiles = gl.load(total)
    scale_rows = gl.cdiv(N, 128) * 2 if SWIGLU else gl.cdiv(N, 128)
    none = gl.zeros([64, 64], gl.float32, layout)
    local = FIRST_ROW + gl.arange(0, 64, gl.SliceLayout(1, layout))
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, PROGRAMS):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        e, row = gl.load(table + row_tile * 4), gl.load(table + row_tile * 4 + 1)
        count = gl.load(table + row_tile * 4 + 2)
        real = local < count
        if SWIGLU:
            block = column_tile
            other_block = gl.cdiv(N, 128) + column_tile
        else:
            block = column_tile * 2
            other_block = min(column_tile * 2 + 1, scale_rows - 1)
        w_scale_at = w_scales + (e * scale_rows + block) * k_tiles
        other_scale_at = w_scales + (e * scale_rows + other_block) * k_tiles
        x_scale_at = x_scales + row + local
        a0, a1, b0, b1 = none, none, none, none
        part, next, never = none, none, k_tiles < 0
        w_scale, other_scale = gl.load(w_scale_at), gl.load(other_scale_at)
        x_scale = gl.load(x_scale_at, mask=real, other=0.0)
        for k in range(k_tiles):
            scale, scale_other = gl.expand_dims(x_scale * w_scale, 1), gl.expand_dims(x_scale * other_scale, 1)
            ahead = min(k + 1, k_tiles - 1)
            w_scale, other_scale = gl.load(w_scale_at + ahead), gl.load(other_scale_at + ahead)
            x_scale = gl.load(x_scale_at + ahead * x_scale_stride, mask=real, other=0.0)
            stage = step % STAGES
            x = x_buffer.index(stage).slice(FIRST_ROW, 64, dim=0)
            w, other = w_buffer.index(stage * 2), w_buffer.index(stage * 2 + 1)
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            part = _issue(x, w.slice(0, 64, dim=0), part, never)
            next = _issue(x, w.slice(64, 64, dim=0), next, never)
            part = warpgroup_mma_wait(1, deps=[part])
            a0 = _add(a0, part, scale)
            part = _issue(x, other.slice(0, 64, dim=0), part, never)
            next = warpgroup_mma_wait(1, deps=[next])
            a1 = _add(a1, next, scale)
            next = _issue(x, other.slice(64, 64, dim=0), next, never)
            part = warpgroup_mma_wait(1, deps=[part])
            b0 = _add(b0, part, scale_other)
            next = warpgroup_mma_wait(0, deps=[next])
            mbarrier.arrive(empty.index(stage), count=1)
            b1 = _add(b1, next, scale_other)
            step += 1
        if SWIGLU:
            column = column_tile * 128
            at = column + gl.arange(0, 64, gl.SliceLayout(0, layout))
            h0 = gl.where(gl.expand_dims(at < N, 0), a0 / (1.0 + gl.exp(-a0)) * b0, 0.0)
            h1 = gl.where(gl.expand_dims(at + 64 < N, 0), a1 / (1.0 + gl.exp(-a1)) * b1, 0.0)
            largest = gl.maximum(gl.max(magnitude(h0), axis=1), gl.max(magnitude(h1), axis=1))
            out_scale = block_scale(largest, False)
            code = encode(h0, gl.expand_dims(out_scale, 1), False)
            _store(out, code, row, count, FIRST_ROW, column, N)
            code = encode(h1, gl.expand_dims(out_scale, 1), False)
            _store(out, code, row, count, FIRST_ROW, column + 64, N)
            gl.store(out_scales + column_tile * out_scale_stride + row + local, out_scale, mask=real)
        else:
            column = column_tile * 256
            element: gl.constexpr = out.dtype.element_ty
            _store(out, a0.to(element), row, count, FIRST_ROW, column, N)
            _store(out, a1.to(element), row, count, FIRST_ROW, column + 64, N)
            _store(out, b0.to(element), row, count, FIRST_ROW, column + 128, N)
            _store(out, b1.to(element), row, count, FIRST_ROW, column + 192, N)


@gluon.jit
def _grouped_kernel(
    x_rows, w_rows, x_scales, x_scale_stride, w_scales, out, out_scales, out_scale_stride, table, total, N, K,
    SWIGLU: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = 128
    x_buffer = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, ROWS, 128], x_rows.layout)
    w_buffer = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 128, 128], w_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    ring, schedule = (x_buffer, w_buffer, full, empty), (table, total)
    sizes = (N, gl.cdiv(N, 128 if SWIGLU else 256), gl.cdiv(K, 128))
    scales, outputs = (x_scales, x_scale_stride, w_scales), (out, out_scales, out_scale_stride)
    gl.warp_specialize(
        [
            (_multiply, (ring, schedule, sizes, scales, outputs, GROUP, PROGRAMS, SWIGLU, STAGES, 0)),
            (_multiply, (ring, schedule, sizes, scales, outputs, GROUP, PROGRAMS, SWIGLU, STAGES, 64)),
            (_load, (ring, schedule, sizes, (x_rows, w_rows), GROUP, PROGRAMS, SWIGLU, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def launch(
    x: Fp8, w: Fp8, groups: Groups, out: Tensor, out_scales: Tensor | None, n: int, tile: Tile, programs: int,
) -> None:  # fmt: skip
    """Two launches: the table of row tiles, whose number only the device knows, and the product."""
    if (tile.rows, tile.columns, tile.halves) != (128, 128, 2):
        raise ValueError(f"tile is {tile}; the specialised kernel takes rows 128, columns 128 and halves 2")
    (rows, k), experts = x.values.shape, w.values.shape[0]
    most = rows // ROWS + min(experts, rows)
    table = torch.empty(most * 4 + 1, dtype=torch.int32, device=out.device)
    total = table[most * 4 :]
    _row_tiles_kernel[(experts,)](
        *groups, table, total, experts, EXPERTS=max(16, triton.next_power_of_2(experts)), ROWS=ROWS, num_warps=4
    )
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    _grouped_kernel[(programs,)](
        TensorDescriptor.from_tensor(x.values, [ROWS, 128], layout),
        TensorDescriptor.from_tensor(w.values.view(-1, k), [128, 128], layout),
        x.scales, x.scales.stride(1), w.scales, out, out_scales, 0 if out_scales is None else out_scales.stride(1),
        table, total, n, k, SWIGLU=out_scales is not None, GROUP=tile.group, PROGRAMS=programs, STAGES=tile.stages,
        num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip

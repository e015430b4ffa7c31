"""The gradient of weights for whole tiles of tokens, in Gluon: as `grouped_gemm_hopper`, with a scale for every column.

`teacher.kernels.weight_gemm` says what is computed. What differs from the other product: the inner dimension is an
expert's tokens, so its length is read on the device; both operands' scales change along it for every row and column, so
a product is multiplied twice on its way into the sum, which still fits beside the tensor cores' time (two fp32
instructions a value and 128 tokens, 616 issue slots of 982 cycles). Columns' scales, 16 a thread and product, are
loaded while that product is under way.

No interpreter: proved on a GPU against the kernel in Triton and the definition.

Shapes: as in weight_gemm.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from teacher.kernels.arguments import multiprocessors
from teacher.kernels.grouped_gemm_hopper import _issue, _store
from teacher.kernels.operands import Fp8, Groups

ROWS, COLUMNS, STAGES = 128, 256, 4
_REGISTERS = 168  # a thread at the start; then 240, 240 and 24


@gluon.jit
def _place(tile, down, across, GROUP: gl.constexpr):
    """Expert, row and column tile: GROUP row tiles take turns over all columns."""
    e = tile // (down * across)
    local = tile % (down * across)
    first = local // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    within = local - first * across
    return e, first + within % height, within // height


@gluon.jit
def _load(ring, groups, sizes, descriptors, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr):
    """One warp: the operands of every tile of this program, in the order in which they are multiplied."""
    dy_buffer, x_buffer, full, empty = ring
    start_E, count_E, E = groups
    dy_rows, x_rows = descriptors
    outputs, inputs = sizes
    down, across = gl.cdiv(outputs, 128), gl.cdiv(inputs, 256)
    step = 0
    for tile in range(gl.program_id(0), E * down * across, PROGRAMS):
        e, row_tile, column_tile = _place(tile, down, across, GROUP)
        start, blocks = gl.load(start_E + e), gl.load(count_E + e) // 128
        for block in range(blocks):
            stage, phase = step % STAGES, step // STAGES & 1
            mbarrier.wait(empty.index(stage), phase ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, (128 + 256) * 128)
            token = start + block * 128
            tma.async_copy_global_to_shared(dy_rows, [row_tile * 128, token], ready, dy_buffer.index(stage))
            tma.async_copy_global_to_shared(x_rows, [column_tile * 256, token], ready, x_buffer.index(stage * 2))
            other = x_buffer.index(stage * 2 + 1)
            tma.async_copy_global_to_shared(x_rows, [column_tile * 256 + 128, token], ready, other)
            step += 1


@gluon.jit
def _add(total, part, row, column):
    """total + part * column * row, in this place; see grouped_gemm_hopper."""
    return gl.inline_asm_elementwise(
        "{.reg .f32 t;\nmul.rn.f32 t, $1, $2;\nfma.rn.f32 $0, t, $3, $4;}", "=f,f,f,f,f", [part, column, row, total],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _multiply(
    ring, groups, sizes, scales, out, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    FIRST_ROW: gl.constexpr,
):  # fmt: skip
    """One warp group's 64 rows of every tile: four sums of 64 x 64, one for each 64 columns."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32])
    dy_buffer, x_buffer, full, empty = ring
    start_E, count_E, E = groups
    outputs, inputs = sizes
    dy_scales, dy_scale_r, x_scales, x_scale_r = scales
    down, across = gl.cdiv(outputs, 128), gl.cdiv(inputs, 256)
    none = gl.zeros([64, 64], gl.float32, layout)
    row = FIRST_ROW + gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = gl.arange(0, 64, gl.SliceLayout(0, layout))
    step = 0
    for tile in range(gl.program_id(0), E * down * across, PROGRAMS):
        e, row_tile, column_tile = _place(tile, down, across, GROUP)
        start, blocks = gl.load(start_E + e), gl.load(count_E + e) // 128
        o, k = row_tile * 128 + row, column_tile * 256 + column
        dy_scale_at = dy_scales + start // 128 * dy_scale_r + o
        x_scale_at = x_scales + start // 128 * x_scale_r + k
        a0, a1, b0, b1 = none, none, none, none
        part, next, never = none, none, blocks < 0
        for block in range(blocks):
            stage = step % STAGES
            dy = dy_buffer.index(stage).slice(FIRST_ROW, 64, dim=0)
            x, other = x_buffer.index(stage * 2), x_buffer.index(stage * 2 + 1)
            by_row = gl.expand_dims(gl.load(dy_scale_at + block * dy_scale_r, mask=o < outputs, other=0.0), 1)
            at = x_scale_at + block * x_scale_r
            by_0 = gl.expand_dims(gl.load(at, mask=k < inputs, other=0.0), 0)
            by_1 = gl.expand_dims(gl.load(at + 64, mask=k + 64 < inputs, other=0.0), 0)
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            part = _issue(dy, x.slice(0, 64, dim=0), part, never)
            next = _issue(dy, x.slice(64, 64, dim=0), next, never)
            part = warpgroup_mma_wait(1, deps=[part])
            a0 = _add(a0, part, by_row, by_0)
            part = _issue(dy, other.slice(0, 64, dim=0), part, never)
            by_0 = gl.expand_dims(gl.load(at + 128, mask=k + 128 < inputs, other=0.0), 0)
            next = warpgroup_mma_wait(1, deps=[next])
            a1 = _add(a1, next, by_row, by_1)
            next = _issue(dy, other.slice(64, 64, dim=0), next, never)
            by_1 = gl.expand_dims(gl.load(at + 192, mask=k + 192 < inputs, other=0.0), 0)
            part = warpgroup_mma_wait(1, deps=[part])
            b0 = _add(b0, part, by_row, by_0)
            next = warpgroup_mma_wait(0, deps=[next])
            mbarrier.arrive(empty.index(stage), count=1)
            b1 = _add(b1, next, by_row, by_1)
            step += 1
        matrix = out + e.to(gl.int64) * outputs * inputs
        first, left = row_tile * 128, outputs - row_tile * 128
        _store(matrix, a0, first, left, FIRST_ROW, column_tile * 256, inputs)
        _store(matrix, a1, first, left, FIRST_ROW, column_tile * 256 + 64, inputs)
        _store(matrix, b0, first, left, FIRST_ROW, column_tile * 256 + 128, inputs)
        _store(matrix, b1, first, left, FIRST_ROW, column_tile * 256 + 192, inputs)


@gluon.jit
def _weight_kernel(
    dy_rows, x_rows, dy_scales, dy_scale_r, x_scales, x_scale_r, out, start_E, count_E, E, outputs, inputs,
    GROUP: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dy_buffer = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], dy_rows.layout)
    x_buffer = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 128, 128], x_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    ring, groups, sizes = (dy_buffer, x_buffer, full, empty), (start_E, count_E, E), (outputs, inputs)
    scales = (dy_scales, dy_scale_r, x_scales, x_scale_r)
    gl.warp_specialize(
        [
            (_multiply, (ring, groups, sizes, scales, out, GROUP, PROGRAMS, STAGES, 0)),
            (_multiply, (ring, groups, sizes, scales, out, GROUP, PROGRAMS, STAGES, 64)),
            (_load, (ring, groups, sizes, (dy_rows, x_rows), GROUP, PROGRAMS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def takes(dy: Fp8, x: Fp8) -> bool:
    """Rows that begin at multiples of 16 bytes (TMA), scales that lie column by column."""
    return all(
        each.values.stride(0) % 16 == 0 and each.values.data_ptr() % 16 == 0 and each.scales.stride(0) == 1
        for each in (dy, x)
    )


def launch(dy: Fp8, x: Fp8, groups: Groups, out_EOK: Tensor, group: int = 8) -> None:
    experts, o, k = out_EOK.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    tiles = experts * triton.cdiv(o, ROWS) * triton.cdiv(k, COLUMNS)
    programs = min(tiles, multiprocessors(out_EOK.device))
    _weight_kernel[(programs,)](
        *(TensorDescriptor.from_tensor(each.values, [128, 128], layout) for each in (dy, x)), dy.scales,
        dy.scales.stride(1), x.scales, x.scales.stride(1), out_EOK, *groups, experts, o, k, GROUP=group,
        PROGRAMS=programs, STAGES=STAGES, num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip

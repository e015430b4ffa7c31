"""Block FP8 quantisation on the GPU: `teacher.fp8.quantize`, bit for bit, in one pass over the data.

Floors, for R rows and C columns of bf16: R C (2 + 1) bytes and 4 R C / 128 for the scales, no arithmetic to speak of
(about ten instructions a value, where 20 would still keep up with 4.3 TB/s on 132 multiprocessors). So every kernel
here reads each value once and keeps it in registers while the block's maximum is found.

Exactness. scale = amax / 448 is a true division; value / scale is Markstein's: with r the rounded reciprocal of the
block's scale, q = x r and q - r (q scale - x) is the correctly rounded quotient, three instructions instead of the ten
of a division, and a zero keeps its sign. Where a scale is so small that the remainder would be less than any number of
fp32, both are lifted first; by a scale of infinity, values are divided as by IEEE's rules. Maxima are taken over the
integers that the absolute values' bits are, which orders them the same and, unlike a maximum of floats, keeps NaN.
Under the interpreter, whose casts to e4m3 round otherwise and do not saturate, the code is put together from the bits.

The kernels in CUDA (`casts_cuda`) go first where they run; those in Triton, here, take every shape and device.

Shapes: R rows, C columns, E matrices in a stack; r, c = ceil(R / 128), ceil(C / 128).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.fp8 import FP8
from teacher.kernels import casts_cuda
from teacher.kernels.arguments import INTERPRETED, multiprocessors, same_device, take

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = tl.constexpr(128)


@triton.jit
def block_scale(amax_bits, POWER_OF_TWO: tl.constexpr):
    """The scale of a block whose largest absolute value has these bits; as `teacher.fp8.quantize` finds it."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, 448.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)  # NaN stays
    if POWER_OF_TWO:
        up = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(amax < float("inf"), up, amax)
    return tl.where(amax == 0, 1.0, scale)


@triton.jit
def magnitude(x):
    """Bits of |x|: integers in the order of the absolute values, NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode(x, scale, INTERPRETED: tl.constexpr):
    """x / scale in e4m3, rounded to nearest even, saturating."""
    if not INTERPRETED:
        lift = tl.where(scale < 8.077935669463161e-28, 18446744073709551616.0, 1.0)  # 2^-90, 2^64
        divisor = tl.where(scale == float("inf"), 0.0, scale * lift)
        reciprocal = tl.where(scale == float("inf"), 0.0, tl.div_rn(1.0, scale * lift))
        x *= lift
        quotient = x * reciprocal
        # Times -1, since Triton's minus is 0 - x, which loses the sign of a zero.
        quotient = tl.fma(tl.fma(quotient, divisor, x * -1.0), reciprocal * -1.0, quotient)
        return quotient.to(tl.float8e4nv)
    quotient = tl.div_rn(x, scale)
    bits = quotient.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # the exponent's bias goes from 127 to 7
    tiny = (tl.abs(quotient) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF  # in steps of 2^-9
    code = tl.where(size < 0x3C800000, tiny, tl.minimum(normal, 0x7E))
    code = tl.where(size > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _rows_kernel(
    x, x_stride, row_source, values, scales, scale_stride, R, C,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, GATHER: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """ROWS rows x BLOCKS tiles of 1 x 128. Scales lie column by column, so that a program's are neighbours."""
    across = tl.cdiv(C, _BLOCK * BLOCKS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * _BLOCK * BLOCKS + tl.arange(0, _BLOCK * BLOCKS)
    inside = (row < R)[:, None] & (column < C)[None, :]
    source = row
    if GATHER:
        source = tl.load(row_source + row, mask=row < R, other=0)
    found = tl.load(x + source.to(tl.int64)[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    tiles = tl.reshape(found.to(tl.float32), [ROWS, BLOCKS, _BLOCK])
    scale = block_scale(tl.max(magnitude(tiles), axis=2), POWER_OF_TWO)
    code = tl.reshape(encode(tiles, scale[:, :, None], INTERPRETED), [ROWS, BLOCKS * _BLOCK])
    tl.store(values + row.to(tl.int64)[:, None] * C + column[None, :], code, mask=inside)
    tile = (tl.program_id(0) % across) * BLOCKS + tl.arange(0, BLOCKS)
    place = scales + tile.to(tl.int64)[None, :] * scale_stride + row[:, None]
    tl.store(place, scale, mask=(row < R)[:, None] & (tile < tl.cdiv(C, _BLOCK))[None, :])


@triton.jit
def _blocks_kernel(
    x, x_matrix, x_stride, x_scales, x_scale_row, x_scale_column, values, scales, R, C, tiles,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr, SCALED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Tiles of 128 x WIDTH, taken in turn: a scale for all of one, or (COLUMNS) one for each of its columns.

    SCALED: x is itself in FP8, in tiles of 1 x 128.
    """
    down, across = tl.cdiv(R, _BLOCK), tl.cdiv(C, WIDTH)
    for index in tl.range(tl.program_id(0), tiles, PROGRAMS, num_stages=STAGES):
        tile = index % (down * across)
        matrix = (index // (down * across)).to(tl.int64)
        tile_row, tile_column = tile // across, tile % across
        row, column = tile_row * _BLOCK + tl.arange(0, _BLOCK), tile_column * WIDTH + tl.arange(0, WIDTH)
        inside = (row < R)[:, None] & (column < C)[None, :]
        place = x + matrix * x_matrix + row.to(tl.int64)[:, None] * x_stride + column[None, :]
        found = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            by = x_scales + row.to(tl.int64) * x_scale_row + tile_column * WIDTH // _BLOCK * x_scale_column
            found *= tl.load(by, mask=row < R, other=0.0)[:, None]
        largest = tl.max(magnitude(found), axis=0)
        if COLUMNS:
            scale = block_scale(largest, POWER_OF_TWO)
            code = encode(found, scale[None, :], INTERPRETED)
            # As the scales of x's transpose, column by column: (C, r) with stride 1 along C.
            tl.store(scales + tile_row.to(tl.int64) * C + column, scale, mask=column < C)
        else:
            scale = block_scale(tl.max(largest, axis=0), POWER_OF_TWO)
            code = encode(found, scale, INTERPRETED)
            at = tile_column * down + tile_row if TRANSPOSED else tile
            tl.store(scales + matrix * down * across + at, scale)
        target = values + matrix * R * C
        if TRANSPOSED:
            place = target + column.to(tl.int64)[:, None] * R + row[None, :]
            tl.store(place, tl.trans(code), mask=tl.trans(inside))
        else:
            tl.store(target + row.to(tl.int64)[:, None] * C + column[None, :], code, mask=inside)


def quantize_activations(
    x_NC: Tensor, row_source_R: Tensor | None = None, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Tiles of 1 x 128: values (R, C) and scales (R, c), the scales stored column by column as the products read them.

    `row_source_R` (int32) gathers on the way: row i is quantised from x_NC[row_source_R[i]], which is how tokens get
    into the order of their experts without a pass of their own. Without it R is N.
    """
    take("x_NC", x_NC, _FLOATS, (2,))
    rows, columns = x_NC.shape
    if row_source_R is not None:
        take("row_source_R", row_source_R, (torch.int32,), (1,), contiguous=True)
        same_device(x_NC=x_NC, row_source_R=row_source_R)
        rows = len(row_source_R)
    values, scales = _empty_rows(rows, columns, x_NC.device)
    scale_stride = scales.stride(1)
    if values.numel() == 0:
        return values, scales
    if casts_cuda.takes(x_NC, transposed=False):
        casts_cuda.rows(x_NC, row_source_R, values, scales, scale_stride, power_of_two)
        return values, scales
    few = rows < 512
    tile_rows, tile_blocks = (1, 8) if few else (8, 4)
    grid = (-(-rows // tile_rows) * -(-columns // (128 * tile_blocks)),)
    _rows_kernel[grid](
        x_NC, x_NC.stride(0), row_source_R, values, scales, scale_stride, rows, columns, ROWS=tile_rows,
        BLOCKS=tile_blocks, GATHER=row_source_R is not None, POWER_OF_TWO=power_of_two, INTERPRETED=INTERPRETED,
        num_warps=4,
    )  # fmt: skip
    return values, scales


def quantize_activations_transposed(x_RC: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize(x_RC.t(), (1, 128))`: tiles of 128 x 1, values (C, R) and scales (C, r). For a backward's products,
    whose inner dimension are the rows (tokens)."""
    take("x_RC", x_RC, _FLOATS, (2,))
    values, scales = _empty_columns(x_RC)
    if x_RC.numel() and casts_cuda.takes(x_RC, transposed=True):
        casts_cuda.transposed(x_RC, casts_cuda.COLUMNS, values, scales, None, None, 0, power_of_two)
        return values, scales
    _launch_blocks(x_RC, values, scales, columns_alone=True, transposed=True, power_of_two=power_of_two)
    return values, scales


def quantize_activations_both_ways(
    x_RC: Tensor, power_of_two: bool = False
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`quantize_activations` and `quantize_activations_transposed`, in CUDA from one read of x."""
    take("x_RC", x_RC, _FLOATS, (2,))
    if not x_RC.numel() or not casts_cuda.takes(x_RC, transposed=True):
        return quantize_activations(x_RC, None, power_of_two), quantize_activations_transposed(x_RC, power_of_two)
    rows, columns = x_RC.shape
    plain, turned = _empty_rows(rows, columns, x_RC.device), _empty_columns(x_RC)
    casts_cuda.transposed(x_RC, casts_cuda.BOTH_WAYS, *turned, *plain, plain[1].stride(1), power_of_two)
    return plain, turned


def requantize_transposed(values_RC: Tensor, scales_Rc: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_activations_transposed` of what lies in tiles of 1 x 128, its products with the scales rounded to fp32:
    values (C, R) and scales (C, r) in one pass, a byte read and one written for a value."""
    take("values_RC", values_RC, (FP8,), (2,), contiguous=True)
    rows, columns = values_RC.shape
    wanted = [rows, -(-columns // 128)]
    if scales_Rc.dtype != torch.float32 or list(scales_Rc.shape) != wanted:
        found = f"{scales_Rc.dtype} of shape {list(scales_Rc.shape)}"
        raise ValueError(f"scales_Rc is {found}; taken: float32 of shape {wanted}")
    same_device(values_RC=values_RC, scales_Rc=scales_Rc)
    values, scales = _empty_columns(values_RC)
    if values.numel() and casts_cuda.takes(values_RC, transposed=True):
        casts_cuda.again(values_RC, scales_Rc, values, scales, power_of_two)
    else:
        _launch_blocks(values_RC, values, scales, True, True, power_of_two, scales_Rc)
    return values, scales


def quantize_weights(w_ERC: Tensor, power_of_two: bool = False, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Blocks of 128 x 128 of a matrix (R, C) or of each of a stack (E, R, C): values and scales (…, r, c).

    `transposed` gives the values and the scales of the transposed matrices, (…, C, R) and (…, c, r): the operand that
    the gradient of the inputs needs, since FP8 products take both operands with the inner dimension last.
    """
    take("w_ERC", w_ERC, _FLOATS, (2, 3))
    values, scales = _empty_blocks(w_ERC, transposed)
    if w_ERC.numel() and casts_cuda.takes(w_ERC, transposed):
        if transposed:
            casts_cuda.transposed(w_ERC, casts_cuda.BLOCKS, values, scales, None, None, 0, power_of_two)
        else:
            casts_cuda.blocks(w_ERC, values, scales, power_of_two)
    else:
        _launch_blocks(w_ERC, values, scales, columns_alone=False, transposed=transposed, power_of_two=power_of_two)
    return values, scales


def quantize_weights_both_ways(
    w_ERC: Tensor, power_of_two: bool = False
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`quantize_weights` as they lie and transposed, in CUDA from one read of w."""
    take("w_ERC", w_ERC, _FLOATS, (2, 3))
    if not w_ERC.numel() or not casts_cuda.takes(w_ERC, transposed=True):
        return quantize_weights(w_ERC, power_of_two), quantize_weights(w_ERC, power_of_two, transposed=True)
    plain, turned = _empty_blocks(w_ERC, False), _empty_blocks(w_ERC, True)
    casts_cuda.transposed(w_ERC, casts_cuda.BLOCKS_TWICE, *turned, *plain, 0, power_of_two)
    return plain, turned


def _empty_rows(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    scale_stride = max(1, -(-rows // 4) * 4)  # whole 16-byte units
    scales_cR = torch.empty(-(-columns // 128), scale_stride, dtype=torch.float32, device=device)
    return torch.empty(rows, columns, dtype=FP8, device=device), scales_cR[:, :rows].t()


def _empty_columns(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x_RC.shape
    scales_rC = torch.empty(-(-rows // 128), columns, dtype=torch.float32, device=x_RC.device)
    return torch.empty(columns, rows, dtype=FP8, device=x_RC.device), scales_rC.t()


def _empty_blocks(w_ERC: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    *stack, rows, columns = w_ERC.shape
    shape = (columns, rows) if transposed else (rows, columns)
    values = torch.empty(*stack, *shape, dtype=FP8, device=w_ERC.device)
    blocks = [-(-size // 128) for size in shape]
    return values, torch.empty(*stack, *blocks, dtype=torch.float32, device=w_ERC.device)


def _launch_blocks(
    x: Tensor, values: Tensor, scales: Tensor, columns_alone: bool, transposed: bool, power_of_two: bool,
    x_scales: Tensor | None = None,
) -> None:  # fmt: skip
    if x.numel() == 0:
        return
    rows, columns = x.shape[-2:]
    matrices, width = x.shape[0] if x.dim() == 3 else 1, 32 if columns_alone else 128
    tiles = matrices * -(-rows // 128) * -(-columns // width)
    # Measured on an H200: a few programs with loads under way pay where tiles are stored as they lie; else one a tile.
    programs = tiles if transposed else min(tiles, 2 * multiprocessors(x.device))
    scale_strides = (0, 0) if x_scales is None else x_scales.stride()
    _blocks_kernel[(programs,)](
        x, x.stride(0) if x.dim() == 3 else 0, x.stride(-2), x_scales, *scale_strides, values, scales, rows, columns,
        tiles, WIDTH=width, COLUMNS=columns_alone, TRANSPOSED=transposed, SCALED=x_scales is not None,
        POWER_OF_TWO=power_of_two, PROGRAMS=programs, STAGES=1 if transposed else 3, INTERPRETED=INTERPRETED,
        num_warps=1 if columns_alone else 4,
    )  # fmt: skip

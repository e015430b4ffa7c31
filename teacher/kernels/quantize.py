"""Block FP8 quantisation on the GPU: `teacher.fp8.quantize`, bit for bit, in one pass over the data.

Floors, for R rows and C columns of bf16: R C (2 + 1) bytes and 4 R C / 128 for the scales, no arithmetic to speak of
(about ten instructions a value, where 20 would still keep up with 4.3 TB/s on 132 multiprocessors). So every kernel
here reads each value once and keeps it in registers while the block's maximum is found.

Exactness. scale = amax / 448 is a true division; value / scale is Markstein's: with r the rounded reciprocal of the
block's scale, q = x r and q + r (x - q scale) is the correctly rounded quotient, three instructions instead of the ten
of a division. Maxima are taken over the integers that the absolute values' bits are, which orders them the same and,
unlike a maximum of floats, keeps NaN. Under the interpreter, whose casts to e4m3 round otherwise and do not saturate,
the code is put together from the bits.

Shapes: R rows, C columns, E matrices in a stack; r, c = ceil(R / 128), ceil(C / 128).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher.fp8 import FP8
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
        reciprocal = tl.div_rn(1.0, scale)
        quotient = x * reciprocal
        quotient = tl.fma(tl.fma(-quotient, scale, x), reciprocal, quotient)
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
    x, x_matrix, x_stride, values, scales, R, C, tiles,
    POWER_OF_TWO: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Tiles of 128 x 128, taken in turn, the next ones under way meanwhile."""
    down, across = tl.cdiv(R, _BLOCK), tl.cdiv(C, _BLOCK)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, num_stages=STAGES):
        matrix = (tile // (down * across)).to(tl.int64)
        row = tile % (down * across) // across * _BLOCK + tl.arange(0, _BLOCK)
        column = tile % across * _BLOCK + tl.arange(0, _BLOCK)
        inside = (row < R)[:, None] & (column < C)[None, :]
        place = x + matrix * x_matrix + row.to(tl.int64)[:, None] * x_stride + column[None, :]
        found = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        scale = block_scale(tl.max(tl.max(magnitude(found), axis=0), axis=0), POWER_OF_TWO)
        tl.store(scales + tile, scale)
        target = values + matrix * R * C + row.to(tl.int64)[:, None] * C + column[None, :]
        tl.store(target, encode(found, scale, INTERPRETED), mask=inside)


@triton.jit
def _code(found, scale, PLACE: tl.constexpr, INTERPRETED: tl.constexpr):
    """e4m3 codes as one byte of a word."""
    return encode(found, scale, INTERPRETED).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * PLACE)


@triton.jit
def _transposed_kernel(
    x, x_matrix, x_stride, words, words_stride, scales, R, C,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of 128 x WIDTH, written as its transpose: a scale for all of it, or (COLUMNS) one for each of its columns.

    Four rows are read as four tiles and their codes packed into words, so that what crosses from the one order to the
    other are a quarter as many values of four bytes; byte by byte that crossing takes longer than the memory.
    """
    down, across = tl.cdiv(R, _BLOCK), tl.cdiv(C, WIDTH)
    tile_row, tile_column = tl.program_id(0) % (down * across) // across, tl.program_id(0) % across
    matrix = (tl.program_id(0) // (down * across)).to(tl.int64)
    word, column = tile_row * 32 + tl.arange(0, 32), tile_column * WIDTH + tl.arange(0, WIDTH)
    row = word * 4
    real = (column < C)[None, :]
    place = x + matrix * x_matrix + row.to(tl.int64)[:, None] * x_stride + column[None, :]
    a = tl.load(place, mask=(row < R)[:, None] & real, other=0.0).to(tl.float32)
    b = tl.load(place + x_stride, mask=(row + 1 < R)[:, None] & real, other=0.0).to(tl.float32)
    c = tl.load(place + x_stride * 2, mask=(row + 2 < R)[:, None] & real, other=0.0).to(tl.float32)
    d = tl.load(place + x_stride * 3, mask=(row + 3 < R)[:, None] & real, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(d)))
    if COLUMNS:
        scale = block_scale(tl.max(largest, axis=0), POWER_OF_TWO)
        # As the scales of x's transpose, column by column: (C, r) with stride 1 along C.
        tl.store(scales + tile_row.to(tl.int64) * C + column, scale, mask=column < C)
        scale = scale[None, :]
    else:
        scale = block_scale(tl.max(tl.max(largest, axis=0), axis=0), POWER_OF_TWO)
        tl.store(scales + (matrix * across + tile_column) * down + tile_row, scale)
    packed = (_code(a, scale, 0, INTERPRETED) | _code(b, scale, 1, INTERPRETED)) | (
        _code(c, scale, 2, INTERPRETED) | _code(d, scale, 3, INTERPRETED)
    )
    target = words + (matrix * C + column)[:, None] * words_stride + word[None, :]
    tl.store(target, tl.trans(packed), mask=(column < C)[:, None] & (word < words_stride)[None, :])


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
    values = torch.empty(rows, columns, dtype=FP8, device=x_NC.device)
    scale_stride = max(1, -(-rows // 4) * 4)  # whole 16-byte units
    scales_cR = torch.empty(-(-columns // 128), scale_stride, dtype=torch.float32, device=x_NC.device)
    scales = scales_cR[:, :rows].t()
    if values.numel() == 0:
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
    whose inner dimension are the rows (tokens). Rows of the values start at whole 16 bytes, as TMA wants them."""
    take("x_RC", x_RC, _FLOATS, (2,))
    rows, columns = x_RC.shape
    scales = torch.empty(-(-rows // 128), columns, dtype=torch.float32, device=x_RC.device).t()
    return _transposed(x_RC, scales, True, power_of_two), scales


def quantize_weights(w_ERC: Tensor, power_of_two: bool = False, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Blocks of 128 x 128 of a matrix (R, C) or of each of a stack (E, R, C): values and scales (…, r, c).

    `transposed` gives the values and the scales of the transposed matrices, (…, C, R) and (…, c, r): the operand that
    the gradient of the inputs needs, since FP8 products take both operands with the inner dimension last.
    """
    take("w_ERC", w_ERC, _FLOATS, (2, 3))
    rows, columns = w_ERC.shape[-2:]
    shape = (columns, rows) if transposed else (rows, columns)
    scales = torch.empty(
        *w_ERC.shape[:-2], *(-(-size // 128) for size in shape), dtype=torch.float32, device=w_ERC.device
    )
    if transposed:
        return _transposed(w_ERC, scales, False, power_of_two), scales
    values = torch.empty(w_ERC.shape, dtype=FP8, device=w_ERC.device)
    if values.numel():
        programs = min(scales.numel(), 2 * multiprocessors(w_ERC.device))
        _blocks_kernel[(programs,)](
            w_ERC, w_ERC.stride(0), w_ERC.stride(-2), values, scales, rows, columns, scales.numel(),
            POWER_OF_TWO=power_of_two, PROGRAMS=programs, STAGES=3, INTERPRETED=INTERPRETED, num_warps=4,
        )  # fmt: skip
    return values, scales


def _transposed(x: Tensor, scales: Tensor, columns_alone: bool, power_of_two: bool) -> Tensor:
    rows, columns = x.shape[-2:]
    stride = -(-rows // 16) * 16
    values = torch.empty(*x.shape[:-2], columns, stride, dtype=FP8, device=x.device)
    if x.numel():
        matrices, width, warps = (x.shape[0] if x.dim() == 3 else 1), *((32, 1) if columns_alone else (128, 4))
        _transposed_kernel[(matrices * -(-rows // 128) * -(-columns // width),)](
            x, x.stride(0), x.stride(-2), values.view(torch.int32), stride // 4, scales, rows, columns, WIDTH=width,
            COLUMNS=columns_alone, POWER_OF_TWO=power_of_two, INTERPRETED=INTERPRETED, num_warps=warps,
        )  # fmt: skip
    return values[..., :rows]

"""The grouped FP8 products against the dequantised product, and against the truth in fp32."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from teacher.fp8 import ACTIVATION_BLOCK, FP8, dequantize
from teacher.kernels.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_reference,
    grouped_swiglu,
    grouped_swiglu_reference,
)
from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.tuning import Tile
from tests.teacher.kernels.grouped import deepgemm_difference, member_rows, operands, quantized, relative

TILES = [
    Tile(128, 128, 2), Tile(64, 128, 1, group=2, warps=4), Tile(16, 128, 2, swap=True, warps=4),
    Tile(32, 64, 1, swap=True, warps=4),
]  # fmt: skip
if torch.cuda.is_available():  # Gluon has no interpreter: without a GPU this one is not proved
    TILES.append(Tile(128, 128, 2, stages=4, specialize=True))
# Hopper's tensor cores add e4m3 products with about 14 bits; the interpreter's products are numpy's.
EXACT = 5e-4 if torch.cuda.is_available() else 1e-5
# (rows of each expert, N, K): one token, none, counts that divide nothing, columns and inner sizes that are ragged.
CASES = [([1], 128, 128), ([5, 0, 130, 1], 577, 320), ([0, 0, 3], 96, 1088), ([40, 17], 256, 256)]


def poisoned(rows, n, device):
    return torch.full((rows, n), float("nan"), dtype=torch.float32, device=device)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_dequantised_product(case, tile, device):
    x, w, groups = operands(*case, device)
    x8, w8 = quantized(x, w)
    found = grouped_gemm(x8, w8, groups, poisoned(len(x), case[1], device), tile)
    assert relative(found, grouped_gemm_reference(x8, w8, groups)) < EXACT
    truth = torch.cat([part @ matrix.t() for part, matrix in zip(x.split(case[0]), w, strict=True)])
    assert deepgemm_difference(found, truth) < (1e-3 if found.numel() > 5000 else 2e-3)  # few values scatter
    floor = relative(grouped_gemm_reference(x8, w8, groups), truth)
    assert relative(found, truth) <= 1.5 * floor


@pytest.mark.parametrize("tile", [tile for tile in TILES if tile.columns == 128], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_swiglu_equals_the_dequantised_products(case, tile, device):
    counts, inner, k = case
    tile = Tile(**{**tile.__dict__, "halves": 2})
    x, w, groups = operands(counts, 2 * inner, k, device)
    x8, w8 = quantized(x, w, halves=2)
    out = Fp8(
        torch.full((len(x), inner), 0x7F, dtype=torch.uint8, device=device).view(FP8),
        poisoned(-(-inner // 128), len(x), device).t(),
    )
    found, expected = grouped_swiglu(x8, w8, groups, out, tile), grouped_swiglu_reference(x8, w8, groups)
    torch.testing.assert_close(found.scales, expected.scales, rtol=50 * EXACT, atol=0)
    back, wanted = (dequantize(*each, torch.float32, ACTIVATION_BLOCK) for each in (found, expected))
    # A value between two codes may go to the other one: by a step of e4m3, and seldom.
    assert relative(back, wanted) < (1e-3 if back.numel() > 5000 else 3e-3)
    truth = torch.cat(
        [
            F.silu(part @ gate.t()) * (part @ up.t())
            for part, (gate, up) in zip(x.split(counts), (matrix.chunk(2) for matrix in w), strict=True)
        ]
    )
    assert relative(back, truth) <= 1.5 * relative(wanted, truth)
    # Two products and two roundings stand behind each value: DeepGEMM's bound, which is for one, does not apply.
    assert deepgemm_difference(back, truth) <= 1.5 * deepgemm_difference(wanted, truth)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_masked_layout_and_gaps(tile, device):
    """Each expert has room for 40 rows; what is not used is NaN before, is not read into others, and stays NaN."""
    counts, capacity = [3, 0, 40, 17], 40
    x, w, groups = operands(counts, 200, 256, device, [e * capacity for e in range(4)], 4 * capacity)
    x8, w8 = quantized(x, w)
    found = grouped_gemm(x8, w8, groups, poisoned(len(x), 200, device), tile)
    expected, members = grouped_gemm_reference(x8, w8, groups), member_rows(groups)
    assert relative(found[members], expected[members]) < EXACT
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()


def test_rows_that_do_not_change_do_not_change_others(device):
    """A row's result depends on nothing but the row: the same alone, in company, and launched again."""
    x, w, groups = operands([30, 50], 256, 256, device)
    x8, w8 = quantized(x, w)
    first = grouped_gemm(x8, w8, groups, tile=TILES[0])
    assert torch.equal(first, grouped_gemm(x8, w8, groups, tile=TILES[0]))
    alone, _ = quantized(x[:1], w)
    one = Groups(*(torch.tensor(each, dtype=torch.int32, device=device) for each in ([0, 1], [1, 0])))
    assert torch.equal(grouped_gemm(alone, w8, one, tile=TILES[0])[0], first[0])


def test_nothing_to_do(device):
    x, w, groups = operands([0, 0], 128, 128, device)
    _, w8 = quantized(torch.ones(1, 128, device=device), w)
    assert grouped_gemm(Fp8(x.to(FP8), x.new_empty(0, 1)), w8, groups).shape == (0, 128)


def test_what_is_not_taken_is_named(device):
    x, w, groups = operands([4, 4], 256, 256, device)
    x8, w8 = quantized(x, w)
    with pytest.raises(ValueError, match=r"x.values is float32; taken: float8_e4m3fn"):
        grouped_gemm(Fp8(x, x8.scales), w8, groups)
    with pytest.raises(ValueError, match=r"x.values has 100 columns, w.values 256; taken: the same, and a multiple"):
        grouped_gemm(Fp8(x8.values[:, :100].contiguous(), x8.scales), w8, groups)
    with pytest.raises(ValueError, match=r"w.scales has shape \[2, 2, 1\]; taken: \[2, 2, 2\]"):
        grouped_gemm(x8, Fp8(w8.values, w8.scales[:, :, :1].contiguous()), groups)
    with pytest.raises(ValueError, match=r"x.scales has strides \[2, 1\]; taken: stride 1 along the rows"):
        grouped_gemm(Fp8(x8.values, x8.scales.contiguous()), w8, groups)
    with pytest.raises(ValueError, match=r"count_E has 1 values; taken: one for each of w's 2 experts"):
        grouped_gemm(x8, w8, Groups(groups.start_E, groups.count_E[:1]))
    with pytest.raises(ValueError, match=r"count_E is int64; taken: int32"):
        grouped_gemm(x8, w8, Groups(groups.start_E, groups.count_E.long()))
    with pytest.raises(ValueError, match=r"out_RN has shape \[8, 100\]; taken: \[8, 256\]"):
        grouped_gemm(x8, w8, groups, torch.empty(8, 100, device=device))
    with pytest.raises(ValueError, match=r"for SwiGLU taken: columns 128"):
        grouped_swiglu(x8, w8, groups, tile=Tile(64, 64, 2))

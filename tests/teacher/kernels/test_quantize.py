"""The quantisation kernels, bit for bit against their definition in teacher.fp8, interpreted and on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from teacher.fp8 import ACTIVATION_BLOCK, FP8, WEIGHT_BLOCK, dequantize, quantize
from teacher.kernels import casts_cuda
from teacher.kernels.quantize import (
    quantize_activations,
    quantize_activations_both_ways,
    quantize_activations_transposed,
    quantize_weights,
    quantize_weights_both_ways,
    requantize_transposed,
)

SHAPES = [(1, 128), (129, 127), (260, 5), (17, 577), (272, 328)]  # only the last one is the kernels' in CUDA


def heavy_tailed(shape, device, dtype=torch.float32):
    """Values over many powers of two, with zeros among them, and each block with a scale of its own."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-12, 8, shape).float())
    x = x.masked_fill(torch.rand(shape) < 0.01, 0.0).masked_fill(torch.rand(shape) < 0.01, -0.0)
    return x.to(device, dtype)


def same(found, expected):
    """Codes and scales equal, bit by bit."""
    (values, scale), (wanted, wanted_scale) = found, expected
    assert values.dtype == FP8 and values.shape == wanted.shape and scale.shape == wanted_scale.shape
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(values.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
    assert wanted.float().abs().sum() > 0


@pytest.mark.parametrize(("dtype", "power_of_two"), [(torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("shape", [*SHAPES, (577, 1088), (600, 264)])
def test_activations(shape, dtype, power_of_two, device):
    x = heavy_tailed(shape, device, dtype)
    same(quantize_activations(x, power_of_two=power_of_two), quantize(x, ACTIVATION_BLOCK, power_of_two))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_their_transpose(shape, power_of_two, device):
    w = heavy_tailed(shape, device)
    same(quantize_weights(w, power_of_two), quantize(w, WEIGHT_BLOCK, power_of_two))
    same(quantize_weights(w, power_of_two, transposed=True), quantize(w.t(), WEIGHT_BLOCK, power_of_two))


@pytest.mark.parametrize(("dtype", "power_of_two"), [(torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_activations_have_tiles_along_the_rows(shape, dtype, power_of_two, device):
    x = heavy_tailed(shape, device, dtype)
    same(quantize_activations_transposed(x, power_of_two), quantize(x.t(), ACTIVATION_BLOCK, power_of_two))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_lies_in_tiles_of_rows_is_quantised_anew_in_tiles_of_columns(shape, device):
    values, scale = quantize_activations(heavy_tailed(shape, device))
    back = dequantize(values, scale.contiguous(), torch.float32, ACTIVATION_BLOCK)
    for scales in (scale, scale.contiguous()):  # column by column, and row by row
        same(requantize_transposed(values, scales), quantize(back.t(), ACTIVATION_BLOCK))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_both_ways(shape, dtype, device):
    x = heavy_tailed(shape, device, dtype)
    plain, turned = quantize_activations_both_ways(x)
    same(plain, quantize(x, ACTIVATION_BLOCK))
    same(turned, quantize(x.t(), ACTIVATION_BLOCK))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 144, 200)])
def test_weights_both_ways(shape, device):
    w = heavy_tailed(shape, device)
    plain, turned = quantize_weights_both_ways(w)
    same(plain, quantize_weights(w))
    same(turned, quantize_weights(w, transposed=True))


def test_a_stack_is_its_matrices(device):
    w = heavy_tailed((3, 200, 130), device)
    for transposed in (False, True):
        values, scale = quantize_weights(w, transposed=transposed)
        for index, matrix in enumerate(w):
            expected = quantize(matrix.t() if transposed else matrix, WEIGHT_BLOCK)
            same((values[index], scale[index]), expected)


def test_more_tiles_than_a_gpu_takes_at_once(device):
    """Tiles whole and not, in every place that the order of tiles gives them."""
    if device == "cpu" or not casts_cuda.takes(torch.zeros(16, 16, device=device), transposed=True):
        pytest.skip("the library in CUDA is not for this machine")
    for x in (heavy_tailed((2320, 6160), device, torch.bfloat16), heavy_tailed((2320, 3088), device)):
        plain, turned = quantize(x, ACTIVATION_BLOCK), quantize(x.t(), ACTIVATION_BLOCK)
        same(quantize_activations_transposed(x), turned)
        for found, expected in zip(quantize_activations_both_ways(x), (plain, turned), strict=True):
            same(found, expected)
        back = dequantize(*plain, torch.float32, ACTIVATION_BLOCK)
        same(requantize_transposed(*plain), quantize(back.t(), ACTIVATION_BLOCK))
        plain, turned = quantize(x, WEIGHT_BLOCK), quantize(x.t(), WEIGHT_BLOCK)
        same(quantize_weights(x, transposed=True), turned)
        for found, expected in zip(quantize_weights_both_ways(x), (plain, turned), strict=True):
            same(found, expected)


def test_rows_are_gathered_and_a_view_is_read_by_its_stride(device):
    wide = heavy_tailed((40, 600), device, torch.bfloat16)
    x, source = wide[:, 100:356], torch.randint(40, (77,), dtype=torch.int32, device=device)
    same(quantize_activations(x, source), quantize(x[source.long()], ACTIVATION_BLOCK))


def test_ties_and_edges_round_to_even_and_saturate(device):
    """Every midpoint between two codes, and its neighbours: where a quotient that is off by one bit shows."""
    codes = torch.arange(0, 0x7E, dtype=torch.uint8).view(FP8).float()
    middle = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([middle, middle.nextafter(torch.tensor(500.0)), middle.nextafter(torch.tensor(0.0)), -middle])
    x = torch.zeros(-(-len(near) // 127), 128)
    x[:, 0] = 448.0  # the block's largest: its scale is 1, or 3 below
    x[:, 1:] = torch.nn.functional.pad(near, (0, x[:, 1:].numel() - len(near))).view(-1, 127)
    for factor in (1.0, 3.0, 1 / 3, 2.0**-20):
        y = (x * factor).to(device)
        same(quantize_activations(y), quantize(y, ACTIVATION_BLOCK))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_pair_of_significands_of_bf16(power_of_two, device):
    """A block's largest value and the one that is divided, over all powers of two that make a difference."""
    significand = 1 + torch.arange(128) / 128
    x = torch.zeros(22, 128, 2, 128)
    x[..., 0] = significand[None, :, None]
    for step in range(22):
        smaller = significand * 2.0**-step
        x[step, :, 0, 1:], x[step, :, 1, 1:] = smaller[:-1], -smaller[1:]
    x = x.where(x.abs() <= significand[None, :, None, None], 0).view(22 * 128, 256).to(device, torch.bfloat16)
    same(quantize_activations(x, power_of_two=power_of_two), quantize(x, ACTIVATION_BLOCK, power_of_two))


def test_zeros_tiny_huge_and_not_finite(device):
    x = torch.zeros(4, 512)
    x[0, 128], x[1, 256], x[2, 384] = 1e-45, 3e38, -1e-38
    for power_of_two in (False, True):
        values, scale = quantize_activations(x.to(device), power_of_two=power_of_two)
        back = dequantize(values, scale, torch.float32, ACTIVATION_BLOCK)
        assert scale.isfinite().all() and (scale > 0).all() and back.isfinite().all()
        assert back[1, 256] > 2.9e38 and not back[3].any()
    x[0, 3], x[1, 130] = float("nan"), float("inf")
    for power_of_two in (False, True):
        _, scale = quantize_activations(x.to(device), power_of_two=power_of_two)
        lost = ~scale.isfinite()
        assert lost[0, 0] and lost[1, 1] and lost.sum() == 2
        _, scale = quantize_weights(x.to(device), power_of_two)
        assert (~scale.isfinite()).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("exponent", [-132, -118, -95, 119])
def test_blocks_at_the_ends_of_what_fp32_holds(exponent, device):
    """Where a remainder of the division would be less than any number of fp32, and where a block holds the largest."""
    x = heavy_tailed((144, 256), "cpu") * 2.0**-8
    x = (x * 2.0 ** (exponent / 2) * 2.0 ** (exponent / 2)).to(device)
    same(quantize_activations(x), quantize(x, ACTIVATION_BLOCK))
    same(quantize_activations_transposed(x), quantize(x.t(), ACTIVATION_BLOCK))
    same(quantize_weights(x), quantize(x, WEIGHT_BLOCK))


def test_finite_values_beside_infinity_are_zeros(device):
    x = heavy_tailed((16, 128), device)
    x[3, 5] = float("inf")
    for values in (quantize_activations(x)[0][3], quantize_activations_transposed(x)[0][5]):
        assert values.float().isnan().sum() == 1 and values.float().nan_to_num().eq(0).all()


def test_cuda_takes_what_it_says(device):
    x = torch.zeros(64, 256, device=device, dtype=torch.bfloat16)
    if not casts_cuda.takes(x, transposed=True):
        pytest.skip("the library in CUDA is not for this machine")
    assert casts_cuda.takes(x[:33], transposed=False) and not casts_cuda.takes(x[:33], transposed=True)
    assert casts_cuda.takes(x[:, 8:], transposed=True) and not casts_cuda.takes(x[:, 4:], transposed=False)
    assert not casts_cuda.takes(x[:, :12], transposed=False)


def test_nothing_to_do(device):
    values, scale = quantize_activations(torch.empty(0, 256, device=device))
    assert values.shape == (0, 256) and scale.shape == (0, 2)


def test_what_is_not_taken_is_named(device):
    x = torch.randn(4, 256, device=device)
    with pytest.raises(ValueError, match=r"x_NC is float64; taken: bfloat16 or float16 or float32"):
        quantize_activations(x.double())
    with pytest.raises(ValueError, match=r"x_NC has strides \[1, 4\]; taken: a last dimension of stride 1"):
        quantize_activations(torch.randn(256, 4, device=device).t())
    with pytest.raises(ValueError, match=r"w_ERC has shape \[4\]; taken: 2 or 3 dimensions"):
        quantize_weights(x[:, 0].contiguous())
    with pytest.raises(ValueError, match=r"row_source_R is int64; taken: int32"):
        quantize_activations(x, torch.zeros(3, dtype=torch.int64, device=device))
    values, scale = quantize_activations(x)
    with pytest.raises(ValueError, match=r"values_RC is float32; taken: float8_e4m3fn"):
        requantize_transposed(x, scale)
    with pytest.raises(
        ValueError, match=r"scales_Rc is torch.float32 of shape \[2, 4\]; taken: float32 of shape \[4, 2\]"
    ):
        requantize_transposed(values, scale.t())

"""Block FP8 against its definition written out, and against transformers' own quantiser."""

from types import SimpleNamespace

import pytest
import torch

from teacher.fp8 import ACTIVATION_BLOCK, FP8, FP8_MAX, WEIGHT_BLOCK, decode, dequantize, quantize, scale_shape

SHAPES = [(1, 1), (128, 128), (129, 127), (576, 320), (100, 1000), (3, 128), (260, 5)]


def heavy_tailed(shape, seed=0):
    """Values over many powers of two, so that blocks have different scales and small values meet subnormals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp2(torch.randint(-12, 8, shape, generator=generator).float())


def blocks_of(x, block):
    """Every block with its place, by slicing."""
    for i in range(0, x.shape[0], block[0]):
        for j in range(0, x.shape[1], block[1]):
            yield i // block[0], j // block[1], x[i : i + block[0], j : j + block[1]]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", [WEIGHT_BLOCK, ACTIVATION_BLOCK])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_block_has_the_scale_of_its_largest_value(shape, block, power_of_two):
    x = heavy_tailed(shape)
    values, scale = quantize(x, block, power_of_two)
    assert values.dtype == FP8 and values.shape == x.shape and values.is_contiguous()
    assert scale.dtype == torch.float32 and list(scale.shape) == scale_shape(shape, block)
    for i, j, part in blocks_of(x, block):
        exact = float(part.abs().max()) / FP8_MAX
        if power_of_two:
            assert exact <= scale[i, j] < 2 * exact and torch.frexp(scale[i, j]).mantissa == 0.5
        else:
            assert float(scale[i, j]) == pytest.approx(exact, rel=1e-6)
    for (i, j, part), (_, _, found) in zip(blocks_of(x, block), blocks_of(values, block), strict=True):
        expected = (part / scale[i, j]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        assert torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("block", [WEIGHT_BLOCK, ACTIVATION_BLOCK, (64, 32)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_values_are_value_times_scale(shape, block, dtype):
    values, scale = quantize(heavy_tailed(shape), block)
    expected = torch.empty(shape, dtype=dtype)
    for i, j, part in blocks_of(values, block):
        expected[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] = part.float() * scale[i, j]
    assert torch.equal(dequantize(values, scale, dtype, block), expected)
    into = torch.full((shape[0] + 2, shape[1]), float("nan"), dtype=dtype)
    dequantize(values, scale, block=block, out_RC=into[1:-1])
    assert torch.equal(into[1:-1], expected) and into[0].isnan().all() and into[-1].isnan().all()


def test_every_code_is_decoded():
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    assert torch.equal(decode(codes).nan_to_num(1e9), codes.float().nan_to_num(1e9))
    assert decode(codes).isnan().sum() == 2
    grid = codes.repeat(3, 2).t()  # neither contiguous nor flat
    assert torch.equal(decode(grid).nan_to_num(1e9), grid.float().nan_to_num(1e9))


def test_strips_of_a_large_tensor_meet(monkeypatch):
    values, scale = quantize(heavy_tailed((1000, 300)))
    whole = dequantize(values, scale, torch.float32)
    monkeypatch.setattr("teacher.fp8._STRIP", 1)
    assert torch.equal(dequantize(values, scale, torch.float32), whole)
    monkeypatch.setattr("teacher.fp8._STRIP", 300 * 300)
    assert torch.equal(dequantize(values, scale, torch.float32), whole)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_error_is_within_half_a_step(power_of_two):
    x = heavy_tailed((300, 400), seed=1)
    values, scale = quantize(x, power_of_two=power_of_two)
    back = dequantize(values, scale, torch.float32)
    step = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :400]
    bound = torch.maximum(x.abs() * 2**-4, step * 2**-10) * (1 + 1e-6)
    assert ((back - x).abs() <= bound).all()
    assert (back - x).abs().max() > 0
    again, scale_again = quantize(back, power_of_two=power_of_two)
    assert torch.equal(dequantize(again, scale_again, torch.float32), back)  # quantising twice changes nothing


def test_zeros_tiny_and_huge_values_stay_finite():
    x = torch.zeros(128, 512)
    x[0, 128], x[0, 256], x[0, 384] = 1e-45, 3e38, -1e-38
    for power_of_two in (False, True):
        values, scale = quantize(x, power_of_two=power_of_two)
        back = dequantize(values, scale, torch.float32)
        assert scale.isfinite().all() and (scale > 0).all() and back.isfinite().all()
        assert not back[:, :128].any() and back[0, 256] > 2.9e38
    _, scale = quantize(torch.tensor([[1.0, float("nan")], [0.0, 2.0]]), (1, 2))
    assert scale[0].isnan().all() and scale[1].isfinite().all()


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_equals_transformers(scale_fmt):
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    settings = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=scale_fmt)
    theirs = module.Fp8Quantize(SimpleNamespace(quantization_config=settings))
    x = heavy_tailed((256, 384), seed=2)
    found = theirs.convert({"a.weight": x})
    values, scale = quantize(x, power_of_two=scale_fmt == "ue8m0")
    torch.testing.assert_close(scale, found["a.weight_scale_inv"].float(), rtol=1e-6, atol=0)
    # They multiply by the reciprocal of the scale: a value on an edge between two codes may fall on the other side.
    differ = values.float() != found["a.weight"].float()
    assert differ.float().mean() < (1e-3 if scale_fmt == "float" else 1e-9)
    undo = module.Fp8Dequantize(SimpleNamespace(quantization_config=settings))
    back = undo.convert({"weight$": [values], "weight_scale_inv": [scale]})["weight"]
    assert torch.equal(back.float(), dequantize(values, scale, torch.float32))

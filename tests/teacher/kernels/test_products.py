"""The kernels of FP8 training against their emulation, which test_fp8_training.py holds to its definition."""

import pytest
import torch

pytest.importorskip("triton")

from teacher import fp8_products as emulated
from teacher.fp8 import FP8, WEIGHT_BLOCK
from teacher.fp8_products import Quantized
from teacher.kernels import products as kernels
from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.weight_gemm import grouped_weight_gemm
from tests.teacher.kernels.grouped import relative


def draw(*shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape[:-1], generator=generator))[..., None]
    return x.to(device)


@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(1, 128, 48), (130, 64, 208), (577, 208, 128), (576, 208, 128), (33, 24, 40)]
)
def test_the_three_products_of_a_linear_layer(rows, inner, outer, device):
    x, w, dy = (draw(*shape, device=device, seed=n) for n, shape in
                enumerate(((rows, inner), (outer, inner), (rows, outer))))  # fmt: skip
    found = [linear(products, x, w, dy) for products in (kernels, emulated)]
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < 1e-3


def turned_by_hand(w):
    return Quantized(w.values.mT.contiguous(), w.scale.mT.contiguous(), WEIGHT_BLOCK)


def linear(products, x, w, dy):
    x8, w8 = products.along_columns(x), products.weight(w)
    dw = products.weight_product(products.along_tokens(dy), products.again_along_tokens(x8))
    dx = products.product(products.along_columns(dy), turned_by_hand(w8), torch.float32)
    (across, along), (w8_again, turned) = products.both_ways(dy), products.weight_both(w)
    assert relative(products.product(across, turned, torch.float32), dx) < 1e-6
    assert torch.equal(products.weight_product(along, products.again_along_tokens(x8)), dw)
    assert torch.equal(w8_again.scale, w8.scale)
    return products.product(x8, w8, torch.float32), dx, dw


@pytest.mark.parametrize("counts", [[128, 0, 256], [0, 0, 128], [384]])
def test_the_three_products_of_experts(counts, device):
    rows, experts, inner, outer = sum(counts), len(counts), 128, 96
    ends_E = torch.tensor(counts, device=device).cumsum(0).int()
    x, w, dy = (draw(*shape, device=device, seed=n) for n, shape in
                enumerate(((rows, inner), (experts, outer, inner), (rows, outer))))  # fmt: skip
    results = []
    for products in (kernels, emulated):
        x8, w8 = products.along_columns(x), products.weight(w)
        dw = products.grouped_weight_product(products.along_tokens(dy), products.again_along_tokens(x8), ends_E)
        dx = products.grouped_product(products.along_columns(dy), turned_by_hand(w8), ends_E, torch.float32)
        turned = products.weight_both(w)[1]
        assert relative(products.grouped_product(products.both_ways(dy)[0], turned, ends_E, torch.float32), dx) < 1e-6
        results.append((products.grouped_product(x8, w8, ends_E, torch.float32), dx, dw))
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) < 1e-3
    for expert, count in enumerate(counts):
        assert bool(results[0][2][expert].any()) == (count > 0)


def test_rows_of_no_expert_are_not_read(device):
    """The gap and what is behind the last expert hold NaN, values and scales."""
    dy, x = (draw(512, columns, device=device, seed=columns) for columns in (128, 96))
    dy[128:256], dy[400:], x[128:256], x[400:] = (float("nan"),) * 4
    groups = Groups(*(torch.tensor(n, dtype=torch.int32, device=device) for n in ([0, 256], [128, 144])))
    dy8, x8 = kernels.along_tokens(dy), kernels.along_tokens(x)
    # The tile that the last expert shares with rows of nobody is scaled as if those were not there.
    dy8, x8 = (
        kernels.along_tokens(torch.where(torch.arange(512, device=device)[:, None] < 400, t, 0)) for t in (dy, x)
    )
    nan = torch.tensor(float("nan"), device=device).to(FP8)
    for operand in (dy8, x8):
        operand.values[:, 128:256] = nan
        operand.values[:, 400:] = nan
    found = grouped_weight_gemm(Fp8(*dy8[:2]), Fp8(*x8[:2]), groups)
    truth = torch.stack([dy[s : s + n].T @ x[s : s + n] for s, n in ((0, 128), (256, 144))])
    assert relative(found, truth) < 0.06


@pytest.mark.parametrize(("change", "message"), [
    ({"x": "half"}, "x.values is float16; taken: float8_e4m3fn"),
    ({"x": "short"}, "dy.values has 128 tokens, x.values 64; taken: the same"),
    ({"groups": "long"}, "start_E is int64; taken: int32"),
])  # fmt: skip
def test_what_is_not_taken_is_named(change, message, device):
    dy8 = kernels.along_tokens(draw(128, 64, device=device))
    x8 = kernels.along_tokens(draw(64 if change.get("x") == "short" else 128, 32, device=device))
    if change.get("x") == "half":
        x8 = x8._replace(values=x8.values.half())
    dtype = torch.int64 if "groups" in change else torch.int32
    groups = Groups(*(torch.tensor([n], dtype=dtype, device=device) for n in (0, 128)))
    with pytest.raises(ValueError, match=message):
        grouped_weight_gemm(Fp8(*dy8[:2]), Fp8(*x8[:2]), groups)

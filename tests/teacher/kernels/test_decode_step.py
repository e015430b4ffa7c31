"""The small kernels of a decoding step, each against its definition: outputs are NaN before they are written."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from teacher.fp8 import ACTIVATION_BLOCK, FP8, dequantize, quantize
from teacher.kernels.heads import absorb, absorb_reference, join, join_reference, values, values_reference
from teacher.kernels.latents import Rotation, write_latents, write_latents_reference
from teacher.kernels.operands import Fp8
from teacher.kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from teacher.kernels.router import choose
from teacher.kernels.row_product import choose_splits, row_product, row_product_reference
from teacher.kernels.swiglu import swiglu, swiglu_reference
from teacher.norm import RMSNorm
from teacher.routing import Router
from tests.teacher.kernels.grouped import relative
from tests.tiny import deepseek_config


def rows_in_fp8(x):
    values, scales = quantize(x, ACTIVATION_BLOCK)
    return Fp8(values, scales.t().contiguous().t())


def same_fp8(found, expected):
    """The same up to a step of e4m3 where the value before lay between two codes."""
    x, y = (dequantize(v, s.contiguous(), torch.float32, ACTIVATION_BLOCK) for v, s in (found, expected))
    return relative(x, y) < 5e-3


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 64, 128), (5, 96, 272), (37, 144, 1088), (130, 64, 576)])
@pytest.mark.parametrize("quantised", [True, False])
def test_row_product(rows, outputs, inputs, quantised, splits, device):
    x, w = torch.randn(rows, inputs, device=device), torch.randn(outputs, inputs, device=device)
    a, b = (rows_in_fp8(x), Fp8(*quantize(w))) if quantised else (x.bfloat16(), w.bfloat16())
    found = row_product(a, b, splits)
    assert found.dtype == torch.float32 and 1 <= len(found) <= (splits or 4)
    assert relative(found.sum(0), row_product_reference(a, b)) < 1e-3
    assert torch.equal(found, row_product(a, b, splits))
    one = row_product(a, b, 1, torch.bfloat16)
    assert one.dtype == torch.bfloat16 and relative(one[0], row_product_reference(a, b)) < 3e-3


def test_row_product_refuses(device):
    x, w = torch.randn(3, 64, device=device), torch.randn(32, 64, device=device)
    with pytest.raises(ValueError, match="x is Tensor, w Fp8; taken: both in FP8, or both in bf16"):
        row_product(x.bfloat16(), Fp8(*quantize(w)))
    with pytest.raises(ValueError, match="x has 300 rows; taken: at most 256"):
        row_product(torch.randn(300, 64, device=device).bfloat16(), w.bfloat16())
    with pytest.raises(ValueError, match="x has 64 columns, w 48; taken: the same"):
        row_product(x.bfloat16(), w[:, :48].contiguous().bfloat16())


def test_splits_fill_the_chip_and_are_not_too_short():
    assert choose_splits(33, 56, 132) == 10 and choose_splits(384, 12, 132) == 1 and choose_splits(4, 56, 132) == 14
    assert choose_splits(112, 128, 132) == 3 and choose_splits(112, 128, 132, 128) == 2
    assert choose_splits(224, 128, 132, 128) == 1 and choose_splits(1, 2, 132) == 1


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 128), (3, 272), (2, 1088)])
def test_add_rms_norm(rows, hidden, parts, device):
    x, weight = torch.randn(rows, hidden, device=device).bfloat16(), torch.rand(hidden, device=device).bfloat16() + 0.5
    more = torch.randn(parts, rows, hidden, device=device) if parts else None
    found = add_rms_norm(x, more, weight, 1e-6, in_fp8=True)
    expected = add_rms_norm_reference(x, more, weight, 1e-6, in_fp8=True)
    assert relative(found.sum_NH, expected.sum_NH) < 1e-3  # a last bit of bf16 where the order of addition decides
    assert relative(found.normed_NH, expected.normed_NH) < 2e-3
    exact = quantize(found.normed_NH, ACTIVATION_BLOCK)
    assert torch.equal(found.in_fp8.values.view(torch.uint8), exact[0].view(torch.uint8))
    assert torch.equal(found.in_fp8.scales, exact[1]) and found.in_fp8.scales.stride(0) == 1
    assert add_rms_norm(x, more, weight, 1e-6).in_fp8 is None


@pytest.mark.parametrize(("rows", "inner", "parts"), [(1, 128, 1), (3, 1088, 2)])
@pytest.mark.parametrize("in_fp8", [True, False])
def test_swiglu(rows, inner, parts, in_fp8, device):
    x = torch.randn(parts, rows, 2 * inner, device=device)
    found, expected = swiglu(x, in_fp8), swiglu_reference(x, in_fp8)
    assert same_fp8(found, expected) if in_fp8 else relative(found, expected) < 2e-3
    assert relative(swiglu(x[:1].bfloat16()), swiglu_reference(x[:1].bfloat16())) < 2e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"n_routed_experts": 32, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8},
        {"n_routed_experts": 64, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6, "norm_topk_prob": False},
        {"n_routed_experts": 16, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
    ],
)
@pytest.mark.parametrize("bias", [0.0, 0.3, -5.0])
def test_the_router_chooses_as_the_models_does(fields, bias, device):
    config = deepseek_config(hidden_size=64, **fields)
    router = Router(config).to(device)
    torch.nn.init.normal_(router.weight, std=0.3)
    router.e_score_correction_bias.normal_().mul_(0.1).add_(bias)
    x = torch.randn(19, 64, device=device)
    expected = router(x)
    logits = torch.stack([x[:, :32] @ router.weight[:, :32].t(), x[:, 32:] @ router.weight[:, 32:].t()]).detach()
    indices, weights = choose(logits.contiguous(), router.e_score_correction_bias, config)
    order, wanted = indices.sort(1), expected.indices_NK.sort(1)
    assert indices.dtype == torch.int64 and torch.equal(order.values, wanted.values)
    assert relative(weights.gather(1, order.indices), expected.weights_NK.gather(1, wanted.indices).detach()) < 1e-5


def test_the_router_refuses_what_it_cannot_lay_out(device):
    config = deepseek_config(n_routed_experts=24, n_group=4)
    with pytest.raises(ValueError, match="powers of two of experts and groups, not 24 in 4"):
        choose(torch.randn(1, 2, 24, device=device), torch.zeros(24, device=device), config)


def rotation(rows, rope, interleave, device):
    angle = torch.rand(rows, rope // 2, device=device) * 6
    return Rotation(angle.cos(), angle.sin(), interleave)


def norm(size, device):
    made = RMSNorm(size, eps=1e-6).to(device).bfloat16()
    made.weight.data.uniform_(0.5, 1.5)
    return made.requires_grad_(False)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(
    ("queries", "normalised", "in_fp8"), [(192, True, True), (64, True, False), (96, False, False)]
)
def test_write_latents(queries, normalised, in_fp8, interleave, device):
    rank, rope, rows = 80, 16, 5
    parts = torch.randn(3, rows, queries + rank + rope, device=device)
    q_norm, kv_norm = norm(queries, device) if normalised else None, norm(rank, device)
    place = torch.tensor([7, 3, 0, 11, 4], device=device)
    turn, caches, found = rotation(rows, rope, interleave, device), [], []
    for function in (write_latents, write_latents_reference):
        cache = torch.full((13, rank + rope), float("nan"), dtype=torch.bfloat16, device=device)
        found.append(function(parts, q_norm, kv_norm, turn, place, cache, in_fp8))
        caches.append(cache)
    assert torch.equal(caches[0].isnan(), caches[1].isnan()) and caches[0].isnan().any()
    assert relative(caches[0][place], caches[1][place]) < 2e-3
    assert same_fp8(*found) if in_fp8 else relative(*found) < 2e-3


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_absorb(rows, interleave, device):
    heads, nope, rank, rope, size = 3, 24, 80, 16, 40
    weight = torch.randn(heads, nope + size, rank, device=device).bfloat16()
    up_k, up_v = weight.split((nope, size), dim=1)
    q, turn = torch.randn(rows, heads, nope + rope, device=device).bfloat16(), rotation(rows, rope, interleave, device)
    for found, expected in zip(absorb(q, up_k, turn), absorb_reference(q, up_k, turn), strict=True):
        assert found.shape == expected.shape and relative(found, expected) < 2e-3
    attended = torch.randn(rows, heads, rank, device=device).bfloat16()
    assert relative(values(attended, up_v), values_reference(attended, up_v)) < 2e-3


@pytest.mark.parametrize("interleave", [True, False, None])
def test_join(interleave, device):
    """Parts of rows that hold more, and a part that all heads share."""
    rows, heads, nope, rope = 5, 35, 24, 16
    whole = torch.randn(rows, heads, nope + 40, device=device).bfloat16()
    part = torch.randn(rows, heads, rope, device=device).bfloat16()
    if interleave is None:
        part = part[:, :1].expand(-1, heads, -1)
    turn = None if interleave is None else rotation(rows, rope, interleave, device)
    found, expected = join(whole[..., :nope], part, turn), join_reference(whole[..., :nope], part, turn)
    assert torch.equal(found[..., :nope], expected[..., :nope]) and found.shape == expected.shape
    assert relative(found, expected) < (2e-3 if turn else 1e-9)
    with pytest.raises(ValueError, match=r"nope_NHP has shape \[5, 35, 24\], rope_NHD \[4, 35, 16\]"):
        join(whole[..., :nope], part[:4], turn)


@pytest.mark.parametrize("rows", [1, 19])
def test_values_in_fp8(rows, device):
    attended = torch.randn(rows, 2, 144, device=device).bfloat16()
    up_v = torch.randn(2, 128, 144, device=device).bfloat16()
    found = values(attended, up_v, in_fp8=True)
    assert found.values.dtype == FP8 and same_fp8(found, values_reference(attended, up_v, in_fp8=True))
    with pytest.raises(ValueError, match="heads of 96 values; taken in FP8: 128, a tile"):
        values(attended, up_v[:, :96], in_fp8=True)


def test_shapes_that_do_not_fit_are_named(device):
    x, weight = torch.randn(2, 64, device=device).bfloat16(), torch.ones(64, device=device)
    with pytest.raises(ValueError, match=r"parts_SNH has shape \[1, 3, 64\]; taken: \(parts, 2, 64\)"):
        add_rms_norm(x, torch.randn(1, 3, 64, device=device), weight, 1e-6)
    config = dataclasses.replace(deepseek_config(), n_routed_experts=16)
    with pytest.raises(ValueError, match="logits of 8 experts, biases of 8; taken: 16"):
        choose(torch.randn(1, 2, 8, device=device), torch.zeros(8, device=device), config)

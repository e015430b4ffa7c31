"""Grouped experts against the definition, one expert at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher import shapes
from teacher.experts import MoE, expert_layout, grouped_experts, reference_experts
from tests.tiny import deepseek_config


def inputs(dtype=torch.float32, tokens=40, experts=6, top_k=3, unused=2):
    """Random tokens, weights and matrices; the last `unused` experts are never chosen."""
    torch.manual_seed(0)
    indices_NK = torch.rand(tokens, experts - unused).topk(top_k, dim=-1).indices
    matrices = torch.randn(experts, 16, 16), torch.randn(experts, 16, 8)
    tensors = torch.randn(tokens, 16), torch.rand(tokens, top_k), *matrices
    x, weights, gate_up, down = (tensor.to(dtype).requires_grad_() for tensor in tensors)
    return x, indices_NK, weights, gate_up, down


@pytest.mark.parametrize("fixed", [False, True])
def test_forward_and_backward_equal_the_reference(fixed, monkeypatch):
    monkeypatch.setattr(shapes, "fixed", lambda x: fixed)  # True: as on a GPU
    arguments = inputs()
    leaves = [tensor for tensor in arguments if tensor.requires_grad]
    found, expected = grouped_experts(*arguments), reference_experts(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(found)
    for got, want in zip(
        torch.autograd.grad(found, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bf16_is_within_its_rounding_of_fp32():
    half = inputs(torch.bfloat16)
    full = [tensor.detach().float().requires_grad_() if tensor.requires_grad else tensor for tensor in half]
    found, expected = grouped_experts(*half), reference_experts(*full)
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()
    found.sum().backward()
    expected.sum().backward()
    for low, high in zip(half, full, strict=True):
        if low.requires_grad:
            assert torch.isfinite(low.grad).all()  # filling rows carry no garbage into a gradient
            assert (low.grad.float() - high.grad).abs().max() < 0.03 * high.grad.abs().max()


def test_autocast_takes_bf16_products_and_fp32_master_weights():
    arguments = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = grouped_experts(*arguments)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert arguments[3].grad.dtype == torch.float32


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(4, 9), st.sampled_from([1, 8, 64]), st.integers(0, 99))
def test_layout_gives_every_pair_a_row_of_its_expert(tokens, top_k, experts, multiple, seed):
    generator = torch.Generator().manual_seed(seed)
    indices_NK = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=-1).indices
    layout = expert_layout(indices_NK, experts, multiple)
    rows = layout.row_NK.flatten().tolist()
    assert len(set(rows)) == tokens * top_k
    assert layout.ends_E.dtype == torch.int32 and (layout.ends_E % multiple == 0).all()
    starts = [0, *layout.ends_E.tolist()]
    for token in range(tokens):
        for slot in range(top_k):
            row, expert = int(layout.row_NK[token, slot]), int(indices_NK[token, slot])
            assert starts[expert] <= row < starts[expert + 1]
            assert int(layout.token_R[row]) == token
    assert len(layout.token_R) == starts[-1]


@pytest.mark.parametrize(("shared", "inner"), [(0, 16), (1, 16), (2, 16), (1, 5)])
def test_moe_is_routed_plus_shared(shared, inner):
    torch.manual_seed(0)
    config = deepseek_config(n_shared_experts=shared, moe_intermediate_size=inner)
    moe = MoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BTH = torch.randn(2, 5, config.hidden_size)
    out_BTH, routing = moe(x_BTH)
    x_NH = x_BTH.flatten(0, 1)
    expected = reference_experts(
        x_NH, routing.indices_NK, routing.weights_NK, moe.experts.gate_up_proj, moe.experts.down_proj
    )
    if shared:
        expected = expected + moe.shared_experts(x_NH)
    torch.testing.assert_close(out_BTH.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)

"""Attention by segment lengths is attention under a block-causal mask."""

import pytest
import torch

from teacher.attention import scaled_dot_product
from teacher.segments import segment_packing, segment_positions

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 3]])


def mask(segments: torch.Tensor) -> torch.Tensor:
    seen = (segments.unsqueeze(-1) == segments.unsqueeze(-2)).tril()
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).unsqueeze(1)


def test_lengths_are_those_of_the_runs_and_positions_restart() -> None:
    assert segment_packing(SEGMENTS) == [3, 2, 1, 2, 1, 6, 1]
    assert segment_positions(SEGMENTS).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 0]]


@pytest.mark.parametrize("value_size", [16, 8])
def test_attention_by_lengths_is_masked_attention_with_its_gradients(value_size: int) -> None:
    torch.manual_seed(0)
    results = []
    for packing in (segment_packing(SEGMENTS), mask(SEGMENTS)):
        torch.manual_seed(0)
        q, k = (torch.randn(2, 8, 3, 16, requires_grad=True) for _ in range(2))
        v = torch.randn(2, 8, 3, value_size, requires_grad=True)
        out = scaled_dot_product(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), packing, 0.3)
        (out * torch.linspace(0, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the mask is what a GPU takes")
def test_a_gpu_gets_the_same_mask() -> None:
    packing = segment_packing(SEGMENTS.cuda())
    assert isinstance(packing, torch.Tensor) and torch.equal(packing.cpu(), mask(SEGMENTS))

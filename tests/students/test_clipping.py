"""Clipping inside AdamW's own pass steps as clipping before it does."""

import copy

import pytest
import torch
from torch import nn

from students.clipping import scale, takes_scale


@pytest.mark.parametrize("size", [0.01, 3.0])  # of gradients: below the largest norm, and above it
def test_a_step_by_a_scale_is_a_step_by_clipped_gradients(size: float) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True) for m in models]
    assert takes_scale(models[0], optimizers[0])
    for step in range(3):
        torch.manual_seed(step)
        gradients = [torch.randn_like(p) * size * (step + 1) for p in models[0].parameters()]
        for model in models:
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
        norm = scale(models[0], optimizers[0], 1.0)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0))
        assert (norm > 1) == (size > 1)
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_other_optimizers_and_sharded_models_are_clipped_before() -> None:
    model = nn.Linear(2, 2)
    assert not takes_scale(model, torch.optim.AdamW(model.parameters()))
    assert not takes_scale(model, torch.optim.SGD(model.parameters()))
    fused = torch.optim.AdamW(model.parameters(), fused=True)
    model.clip_grad_norm_ = lambda largest: None  # FSDP's
    assert not takes_scale(model, fused)

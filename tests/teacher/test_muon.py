"""Muon: against torch's own for single matrices, and stacked experts against each alone."""

import pytest
import torch

from teacher import shapes
from teacher.muon import MuonAdamW, orthogonalise


def test_orthogonalise_brings_every_singular_value_near_one():
    torch.manual_seed(0)
    for shape in [(64, 128), (128, 64), (5, 32, 48)]:
        singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert singular.min() > 0.5 and singular.max() < 1.5


def _train(make, shape, steps=5):
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(shape))
    optimizer = make(weight)
    for _ in range(steps):
        weight.grad = torch.randn(shape)
        optimizer.step()
    return weight.detach()


def _ours(weight):
    return MuonAdamW([weight], [], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_single_matrices_go_as_torchs_muon(shape):
    def torchs(weight):
        return torch.optim.Muon([weight], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")

    torch.testing.assert_close(_train(_ours, shape), _train(torchs, shape), atol=2e-3, rtol=2e-2)


def test_stacked_experts_go_as_each_alone():
    torch.manual_seed(2)
    start, grads = torch.randn(3, 8, 12), torch.randn(4, 3, 8, 12)

    def after(weight, pick):
        parameter = torch.nn.Parameter(weight.clone())
        optimizer = _ours(parameter)
        for grad in grads:
            parameter.grad = pick(grad).clone()
            optimizer.step()
        return parameter.detach()

    stacked = after(start, lambda grad: grad)
    for expert in range(3):
        alone = after(start[expert], lambda grad, expert=expert: grad[expert])
        torch.testing.assert_close(stacked[expert], alone, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_matrices_of_one_shape_together_go_as_each_alone(moments, monkeypatch):
    """As on a GPU: several at once, stacks among them, with the rate as a tensor."""
    torch.manual_seed(4)
    starts = [torch.randn(shape) for shape in [(12, 20), (3, 12, 20), (20, 12), (12, 20)]]
    gradients = [[torch.randn_like(start) for start in starts] for _ in range(4)]

    def after(together):
        monkeypatch.setattr(shapes, "fixed", lambda x: together)
        parameters = [torch.nn.Parameter(start.clone()) for start in starts]
        rates = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}
        optimizer = MuonAdamW(parameters, [], moments=moments, **rates)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.02) if together else 0.02
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    for together, alone, start in zip(after(True), after(False), starts, strict=True):
        assert (alone - start).abs().max() > 0.01
        torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-2)


def test_state_survives_a_save_and_load():
    def run(interrupted):
        torch.manual_seed(3)
        matrix, vector = torch.nn.Parameter(torch.randn(6, 8)), torch.nn.Parameter(torch.randn(8))
        optimizer = MuonAdamW([matrix], [vector], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(4):
            if interrupted and step == 2:
                state = optimizer.state_dict()
                optimizer = MuonAdamW([matrix], [vector], lr=0.5, betas=(0.9, 0.95), weight_decay=0.1)
                optimizer.load_state_dict(state)
            matrix.grad, vector.grad = torch.randn(6, 8), torch.randn(8)
            optimizer.step()
        return torch.cat([matrix.detach().flatten(), vector.detach()])

    assert torch.equal(run(False), run(True))

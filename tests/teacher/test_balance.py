"""Expert balance: what is counted, which way the bias moves, and that it balances."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from teacher import load_model
from teacher.balance import LoadBalance, max_violation, sequence_balance_loss
from teacher.routing import Routing
from tests.tiny import deepseek_config


def routing_of(indices: list[list[int]], experts: int = 8) -> Routing:
    chosen = torch.tensor(indices)
    return Routing(chosen, torch.ones(chosen.shape), torch.rand(len(indices), experts))


def test_padding_and_positions_without_a_next_token_are_not_counted() -> None:
    balance = LoadBalance(load_model(deepseek_config()))  # two MoE layers, and the MTP module's
    segments = torch.tensor([[1, 1, 2, 2, 0]])
    main = routing_of([[0, 1], [0, 2], [0, 3], [4, 5], [7, 6]])
    mtp = routing_of([[0, 1], [2, 3], [0, 4], [5, 6]])  # one position shorter; only positions 0 and 2 have a next token
    loads = balance.loads([main, main, mtp], segments)
    assert loads[0].tolist() == loads[1].tolist() == [3, 1, 1, 1, 1, 1, 0, 0]
    assert loads[2].tolist() == [2, 1, 0, 0, 1, 0, 0, 0]
    assert balance.loads([main, main], segments)[2].tolist() == [0] * 8  # the MTP module did not run


def test_update_moves_each_bias_by_the_sign_of_its_load_error_once() -> None:
    model = load_model(deepseek_config())
    balance = LoadBalance(model)
    loads = torch.zeros(3, 8, dtype=torch.int64)
    loads[0] = torch.tensor([9, 1, 5, 5, 5, 5, 5, 5])
    violation = balance.update(loads, 0.01)
    assert violation[0].item() == pytest.approx(9 / 5 - 1)
    expected = torch.tensor([-0.01, 0.01] + [0.0] * 6)
    assert torch.equal(balance.routers[0].e_score_correction_bias, expected)
    assert not balance.routers[1].e_score_correction_bias.any()  # no load at all: nothing to correct


def test_bias_balances_a_skewed_router() -> None:
    """Experts that all tokens prefer get 4 times their share; the sign update must bring that down without training."""
    torch.manual_seed(0)
    config = deepseek_config(n_group=1, topk_group=1)
    model = load_model(config)
    balance = LoadBalance(model)
    gate = balance.routers[0]
    gate.weight.data[:, 0] = torch.linspace(2, -2, config.n_routed_experts)
    x = torch.randn(512, config.hidden_size)
    x[:, 0] = 1.0
    segments = torch.ones(1, 512, dtype=torch.int64)
    history = []
    for _ in range(300):
        history.append(balance.update(balance.loads([gate(x)], segments), 0.01)[0].item())
    assert history[0] > 1.5
    assert sum(history[-20:]) / 20 < 0.1


def test_recomputing_activations_does_not_count_twice() -> None:
    torch.manual_seed(0)
    model = load_model(deepseek_config())
    ids = torch.randint(200, (2, 20))
    segments = torch.ones(2, 20, dtype=torch.int64)
    loads = []
    for recompute in (False, True):
        if recompute:
            for layer in model.main_layers:
                forward = layer.forward
                layer.forward = lambda *a, forward=forward: checkpoint(forward, *a, use_reentrant=False)
        balance = LoadBalance(model)
        out = model(ids, mtp=True)
        loads.append(balance.loads(out.routing, segments))
        before = loads[-1].clone()
        out.logits.sum().backward()
        assert torch.equal(loads[-1], before)
    assert torch.equal(loads[0], loads[1])
    assert loads[0].sum(1).tolist() == [2 * 20 * 2, 2 * 20 * 2, 2 * 19 * 2]


def test_sequence_loss_is_the_papers_formula() -> None:
    """DeepSeek-V3 eq. 17-20, written with loops."""
    torch.manual_seed(0)
    tokens, experts, top_k = 12, 6, 2
    scores = torch.rand(tokens, experts, requires_grad=True)
    sequence = torch.tensor([0] * 5 + [1] * 4 + [-1] * 3)
    total = sequence_balance_loss(scores, top_k, sequence, 2)
    expected = torch.zeros(())
    for s in (0, 1):
        own = scores[sequence == s]
        length = len(own)
        for i in range(experts):
            chosen = sum(int(i in row.topk(top_k).indices) for row in own)
            f = experts / (top_k * length) * chosen
            p = sum(row[i] / row.sum() for row in own) / length
            expected = expected + f * p
    torch.testing.assert_close(total, expected)
    (gradient,) = torch.autograd.grad(total, scores)
    (wanted,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(gradient, wanted)
    assert not gradient[sequence == -1].any()


def test_sequence_loss_is_one_where_a_sequence_is_balanced() -> None:
    scores = torch.eye(4).repeat(3, 1) * 0.5 + 0.25
    assert sequence_balance_loss(scores, 1, torch.zeros(12, dtype=torch.int64), 1).item() == pytest.approx(1.0)


def test_max_violation_is_relative_to_the_mean() -> None:
    assert max_violation(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0]])).tolist() == [0.0, 3.0, 0.0]


def test_a_model_without_experts_has_nothing_to_balance() -> None:
    balance = LoadBalance(load_model(deepseek_config(first_k_dense_replace=4)))
    loads = balance.loads([], torch.ones(1, 3, dtype=torch.int64))
    assert balance.update(loads, 0.1).tolist() == []

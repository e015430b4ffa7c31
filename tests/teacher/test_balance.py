"""Expert balance: what is counted, which way the bias moves, and that it balances."""

from pathlib import Path
from typing import Any

import pytest
import torch

from teacher import load_model
from teacher.balance import LoadBalance, max_violation, sequence_balance_loss
from teacher.batches import Cursor, StepBatch, step_batches
from teacher.engine import Engine, Request
from teacher.model import DeepseekV3
from teacher.objective import Objective
from teacher.routing import Routing
from teacher.train import train
from tests.teacher import train_toy
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


def fresh(**changes: Any) -> tuple[DeepseekV3, list[torch.Tensor]]:
    """A toy model in training mode, and the selection biases of its MoE layers."""
    model = train_toy.model(**changes).train()
    return model, [router.e_score_correction_bias for router in LoadBalance(model).routers]


def accumulated_step() -> StepBatch:
    """Four micro-batches of one row each, with padding at the end of rows."""
    fields = {"rows": 4, "micro_rows": 1, "seq_len": 128, "longest": 40, "depths": 2}
    return next(step_batches(train_toy.example, Cursor(), **fields))


def test_one_update_an_optimizer_step_whatever_is_accumulated(tmp_path: Path) -> None:
    """After one step of four micro-batches each bias has moved once, by the sign of the whole step's load error."""
    model, _ = fresh()
    loads = torch.zeros(3, 8, dtype=torch.int64)
    for micro in accumulated_step().micro:
        out = model(micro.input_ids_BT, segment_ids_BT=micro.segment_ids_BT, mtp=True)
        segments_T = micro.segment_ids_BT[0]
        # The MTP module has no token to read at an example's last position.
        followed_T = (segments_T[1:] == segments_T[:-1]) & (segments_T[1:] > 0)
        for layer, (routing, real_T) in enumerate(zip(out.routing, [segments_T > 0] * 2 + [followed_T], strict=True)):
            loads[layer] += routing.indices_NK[real_T].flatten().bincount(minlength=8)
    assert 0 < loads[2].sum() < loads[0].sum() < 2 * 4 * 128  # there is padding

    model, biases = fresh()
    settings = train_toy.settings(total_tokens=1, tokens_per_step=512, micro_tokens=128, balance_speed=0.01)
    assert train(model, train_toy.example, settings, tmp_path).steps == 1
    for bias_E, loads_E in zip(biases, loads, strict=True):
        torch.testing.assert_close(bias_E, 0.01 * torch.sign(loads_E.sum() / 8 - loads_E))
        assert bias_E.any()


def test_the_bias_is_outside_the_gradient(tmp_path: Path) -> None:
    """It is no parameter, and one step moves the weights to the same bits whatever the speed: it acts from the next."""
    after = []
    for speed in (0.0, 0.5):
        model, biases = fresh()
        assert not any("bias" in name for name, _ in model.named_parameters())
        assert not any(bias.requires_grad for bias in biases)
        settings = train_toy.settings(total_tokens=1, balance_speed=speed)
        train(model, train_toy.example, settings, tmp_path / str(speed))
        after.append(model)
    for (name, one), other in zip(after[0].named_parameters(), after[1].parameters(), strict=True):
        assert torch.equal(one, other), name
    assert all(router.e_score_correction_bias.abs().max() == 0.5 for router in LoadBalance(after[1]).routers)


def test_evaluation_and_generation_are_not_counted(tmp_path: Path) -> None:
    """A hook that evaluates and generates with the model in training leaves the biases as they come without it."""

    def use(model: DeepseekV3, step: int) -> dict[str, Any]:
        ids = torch.randint(10, (4, 30))
        model(ids, mtp=True)
        engine = Engine(model, None, batch_size=2, max_len=64, speculate=1)
        done = list(engine.generate([Request(str(n), [n, n + 1], max_tokens=8, seed=n) for n in range(3)]))
        return {"generated": sum(len(completion.token_ids) for completion in done)}

    kept = []
    for every in (0, 1):
        model, biases = fresh()
        settings = train_toy.settings(total_tokens=1_500, eval_every=every)
        result = train(model, train_toy.example, settings, tmp_path / str(every), eval_hook=use if every else None)
        kept.append(torch.stack(biases))
    assert result.last["eval"]["generated"] > 0
    assert torch.equal(kept[0], kept[1]) and kept[0].any()


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputing_activations_changes_nothing(bf16: bool) -> None:
    """Loss, loads and gradients, to the bit; and layers do run again in backward."""
    parts, calls = [], []
    for recompute in (False, True):
        model, _ = fresh()
        model.recompute = recompute
        for layer in [*model.main_layers, *model.mtp_layers]:
            layer.self_attn.register_forward_hook(lambda *_: calls.append(recompute))  # noqa: B023
        step = accumulated_step()
        parts.append(Objective(0.3, 0.1, bf16, 1).part(model, LoadBalance(model), step.micro[0], step))
    assert calls.count(True) == 2 * calls.count(False) == 2 * 5  # three main layers, and the module twice
    assert torch.equal(parts[0].loads_LE, parts[1].loads_LE)
    assert parts[0].figures == parts[1].figures
    for (name, _), one, other in zip(model.named_parameters(), parts[0].gradients, parts[1].gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other), name


def test_recomputing_activations_trains_the_same_weights(tmp_path: Path) -> None:
    states = []
    for recompute in (False, True):
        model, _ = fresh()
        settings = train_toy.settings(
            total_tokens=1_500, tokens_per_step=256, micro_tokens=128, recompute=recompute, balance_loss=0.1
        )
        train(model, train_toy.example, settings, tmp_path / str(recompute))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


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


def test_every_layer_adds_its_sequence_loss() -> None:
    balance = LoadBalance(load_model(deepseek_config()))
    segments = torch.tensor([[1, 1, 2, 2, 0]])
    routings = [routing_of([[0, 1]] * 5), routing_of([[2, 3]] * 5), routing_of([[4, 5]] * 4)]
    each = [sequence_balance_loss(r.scores_NE, 2, torch.tensor([0, 0, 1, 1, -1]), 2) for r in routings[:2]]
    # The MTP module computes on an example's tokens but the last.
    each.append(sequence_balance_loss(routings[2].scores_NE, 2, torch.tensor([0, -1, 1, -1]), 2))
    torch.testing.assert_close(balance.sequence_loss(routings, segments), sum(each))


def test_a_frozen_router_keeps_its_bias() -> None:
    balance = LoadBalance(load_model(deepseek_config()))
    balance.routers[1].weight.requires_grad_(False)
    balance.update(torch.arange(24).view(3, 8), 0.01)
    moved = [bool(router.e_score_correction_bias.any()) for router in balance.routers]
    assert moved == [True, False, True]


def test_max_violation_is_relative_to_the_mean() -> None:
    assert max_violation(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0]])).tolist() == [0.0, 3.0, 0.0]


def test_a_model_without_experts_has_nothing_to_balance() -> None:
    balance = LoadBalance(load_model(deepseek_config(first_k_dense_replace=4)))
    loads = balance.loads([], torch.ones(1, 3, dtype=torch.int64))
    assert balance.update(loads, 0.1).tolist() == []

"""The router against DeepSeek's published inference code, and what the selection bias may and may not do."""

import pytest
import torch

from teacher.routing import Router, choose_experts
from tests.tiny import deepseek_config


def deepseek_gate(x, weight, bias, n_groups, topk_groups, topk, route_scale):
    """`Gate.forward` of DeepSeek-V3's inference/model.py (MIT licence), for sigmoid scores with a bias."""
    scores = (x @ weight.t()).sigmoid()
    original_scores = scores
    scores = scores + bias
    if n_groups > 1:
        scores = scores.view(x.size(0), n_groups, -1)
        group_scores = scores.topk(2, dim=-1)[0].sum(dim=-1)
        indices = group_scores.topk(topk_groups, dim=-1)[1]
        mask = scores.new_ones(x.size(0), n_groups, dtype=torch.bool).scatter_(1, indices, False)
        scores = scores.masked_fill_(mask.unsqueeze(-1), float("-inf")).flatten(1)
    indices = torch.topk(scores, topk, dim=-1)[1]
    weights = original_scores.gather(1, indices)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights * route_scale, indices


def dense(weights_NK, indices_NK, experts):
    return torch.zeros(len(weights_NK), experts).scatter_(1, indices_NK, weights_NK)


@pytest.mark.parametrize("bias_mean", [0.0, -0.5, -3.0])
@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (4, 1), (2, 2), (1, 1)])
def test_equals_deepseeks_gate(bias_mean, groups, kept):
    torch.manual_seed(0)
    config = deepseek_config(n_routed_experts=16, n_group=groups, topk_group=kept, num_experts_per_tok=4)
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias += bias_mean + 0.3 * torch.randn(16)
    x_NH = torch.randn(200, config.hidden_size)
    found = router(x_NH)
    weights, indices = deepseek_gate(
        x_NH, router.weight, router.e_score_correction_bias, groups, kept, 4, config.routed_scaling_factor
    )
    torch.testing.assert_close(dense(found.weights_NK, found.indices_NK, 16), dense(weights, indices, 16))


def test_unselected_groups_stay_out_when_all_biased_scores_are_negative():
    # Groups {0, 1} and {2, 3}; the first is better. With a mask of 0, expert 2 or 3 would beat the negative 0 and 1.
    biased_NE = torch.tensor([[-1.0, -2.0, -5.0, -6.0]])
    assert set(choose_experts(biased_NE, n_group=2, topk_group=1, top_k=2)[0].tolist()) == {0, 1}


def test_bias_moves_the_choice_but_not_the_weights():
    torch.manual_seed(0)
    config = deepseek_config(n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    x_NH = torch.randn(50, config.hidden_size)
    router.e_score_correction_bias[5] = 10.0
    found = router(x_NH)
    assert (found.indices_NK == 5).any(1).all()
    torch.testing.assert_close(found.weights_NK, found.scores_NE.gather(1, found.indices_NK))
    assert found.weights_NK.max() < 1


def test_gradient_reaches_the_gate_and_not_the_bias():
    config = deepseek_config()
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    (router(torch.randn(20, config.hidden_size)).weights_NK[:, 0]).sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0
    assert not router.e_score_correction_bias.requires_grad
    assert "e_score_correction_bias" in router.state_dict()


def test_scores_stay_in_fp32_under_autocast():
    router = Router(deepseek_config())
    torch.nn.init.normal_(router.weight)
    x_NH = torch.randn(20, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(x_NH)
    assert found.scores_NE.dtype == torch.float32
    torch.testing.assert_close(found.scores_NE, router(x_NH).scores_NE)

"""The next-token draw against transformers' own warpers, and the counter-based random numbers."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from evals.sampling import draw, seed_of, uniforms


def warped(logits_BV, temperature, top_p):
    scores = TemperatureLogitsWarper(temperature)(None, logits_BV)
    return TopPLogitsWarper(top_p)(None, scores).softmax(-1)


@pytest.mark.parametrize("vocabulary", [7, 64, 400])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.95), (1.0, 0.3), (1.5, 1.0), (0.6, 0.999999)])
@pytest.mark.parametrize("spread", [0.3, 4.0])  # nearly flat: nuclei of hundreds of tokens; peaked: of a few
def test_draws_have_the_distribution_of_transformers_warpers(vocabulary, temperature, top_p, spread):
    torch.manual_seed(0)
    logits_V = torch.randn(vocabulary) * spread
    expected_V = warped(logits_V[None], temperature, top_p)[0].double()
    grid = (torch.arange(20_000) + 0.5) / 20_000  # an even grid of uniforms: the histogram is the distribution itself
    drawn = draw(
        logits_V.expand(20_000, -1), torch.full((20_000,), temperature), torch.full((20_000,), top_p), grid.float()
    )
    histogram_V = torch.bincount(drawn, minlength=vocabulary).double() / 20_000
    assert (histogram_V - expected_V).abs().max() < 2e-4
    assert not histogram_V[expected_V == 0].any()


def test_extreme_uniforms_never_leave_the_nucleus():
    torch.manual_seed(1)
    logits_BV = torch.randn(200, 50) * 3
    allowed_BV = warped(logits_BV, 0.6, 0.9) > 0
    for uniform in (0.0, 1 - 2.0**-24, 0.5):
        drawn_B = draw(logits_BV, torch.full((200,), 0.6), torch.full((200,), 0.9), torch.full((200,), uniform))
        assert allowed_BV.gather(1, drawn_B[:, None]).all()


def test_rows_keep_their_own_settings():
    logits_BV = torch.tensor([[0.0, 1.0, 0.5]]).expand(3, -1)
    drawn = draw(
        logits_BV, torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1e-6, 1.0]), torch.tensor([0.9, 0.9, 0.0])
    )
    assert drawn.tolist() == [1, 1, 0]  # greedy, a nucleus of one, the first token at u = 0


def test_uniforms_are_uniform_and_depend_on_seed_and_step_only():
    seeds = np.arange(2000, dtype=np.uint64)
    values = np.stack([uniforms(seeds, np.full(2000, step, np.uint64)) for step in range(50)])
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    expected = values.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-squared, 99 degrees of freedom: p about 1e-4
    for a, b in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:])):  # neighbouring steps, neighbouring seeds
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02
    assert uniforms(seeds[7:8], np.array([3], np.uint64))[0] == values[3, 7]
    assert seed_of(0, "p", 1) != seed_of(0, "p", 2) and 0 <= seed_of("x") < 2**63
    assert seed_of("ab", "c") != seed_of("a", "bc")

"""Draws: uniform, bound to (seed, counter), and distributed as temperature, top-k and top-p say."""

import pytest
import torch

from teacher.sampling import Settings, sample, sample_likely, uniform


def draw(logits_BV, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, first_seed=0):
    rows = len(logits_BV)

    def full(value, dtype):
        return torch.full((rows,), value, dtype=dtype)

    seeds = torch.arange(first_seed, first_seed + rows)
    settings = Settings(
        full(temperature, torch.float32), full(top_p, torch.float32), full(top_k, torch.long),
        full(min_p, torch.float32), seeds,
    )  # fmt: skip
    return sample(logits_BV, settings, full(3, torch.long))


def splitmix64(x):
    """The finaliser in Python's integers, from its published constants."""
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_uniform_is_splitmix64_on_seed_and_counter():
    for seed, counter in [(0, 0), (1, 0), (0, 1), (123456789, 77), (2**63 - 1, 5), (-5, 9)]:
        mixed = splitmix64(seed % 2**64) ^ (counter * 0x9E3779B97F4A7C15 % 2**64)
        expected = (splitmix64(mixed) >> 11) * 2.0**-53
        assert float(uniform(torch.tensor([seed]), torch.tensor([counter]))[0]) == expected


@pytest.mark.parametrize("along", ["seeds", "counters"])
def test_uniform_is_uniform_and_uncorrelated(along):
    numbers, zero = torch.arange(1, 100_001), torch.zeros(100_000, dtype=torch.long)
    u = uniform(numbers, zero) if along == "seeds" else uniform(zero + 7, numbers)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u, bins=50, min=0, max=1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 86  # chi-square, 49 degrees of freedom, p = 0.001
    assert abs(float(torch.corrcoef(torch.stack((u[1:], u[:-1])))[0, 1])) < 0.012


def allowed(probs, top_p, top_k, min_p):
    """Tokens that may be drawn and their probabilities, by the definition."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    order = [token for token in order if probs[token] >= min_p * probs[order[0]]]
    if top_k:
        order = order[:top_k]
    total, kept, mass = sum(probs[token] for token in order), [], 0.0
    for token in order:
        if mass < top_p * total:
            kept.append(token)
        mass += probs[token]
    share = sum(probs[token] for token in kept)
    return {token: probs[token] / share for token in kept}


@pytest.mark.parametrize("vocabulary", [12, 400])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0), (0.6, 0.95, 0, 0), (1.5, 0.5, 0, 0), (1.0, 1.0, 4, 0), (0.8, 0.7, 6, 0), (1.0, 1.0, 0, 0.1),
        (1.5, 1.0, 0, 0.001), (1.0, 0.8, 9, 0.05),
    ],
)  # fmt: skip
def test_frequencies_follow_the_definition(vocabulary, temperature, top_p, top_k, min_p):
    generator = torch.Generator().manual_seed(vocabulary)
    logits_V = 3 * torch.randn(vocabulary, generator=generator)
    expected = allowed((logits_V / temperature).softmax(-1).tolist(), top_p, top_k, min_p)
    draws = 20_000
    tokens = draw(logits_V.expand(draws, -1), temperature, top_p, top_k, min_p)
    counts = torch.bincount(tokens, minlength=vocabulary).tolist()
    assert {token for token, count in enumerate(counts) if count} <= set(expected)
    for token, share in expected.items():
        spread = (share * (1 - share) / draws) ** 0.5
        assert abs(counts[token] / draws - share) < 4.5 * spread + 2 / draws, (token, share)


def test_partial_sort_gives_what_a_full_sort_gives():
    generator = torch.Generator().manual_seed(0)
    peaked_BV = 4 * torch.randn(500, 300, generator=generator)
    flat_BV = torch.zeros(1, 300)  # one row that needs all candidates makes the whole batch sort them all
    assert torch.equal(draw(peaked_BV, 0.6, 0.95), draw(torch.cat((peaked_BV, flat_BV)), 0.6, 0.95)[:-1])


def test_temperature_zero_is_argmax_beside_sampled_rows():
    logits_BV = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(2, dtype=torch.long)
    settings = Settings(torch.tensor([0.0, 5.0]), torch.ones(2), zeros, torch.zeros(2), torch.arange(2))
    tokens = sample(logits_BV, settings, zeros)
    assert int(tokens[0]) == int(logits_BV[0].argmax())
    assert torch.equal(draw(logits_BV, temperature=0.0), logits_BV.argmax(-1))


def test_tiny_top_p_keeps_the_best_token():
    logits_BV = torch.randn(100, 30, generator=torch.Generator().manual_seed(2))
    assert torch.equal(draw(logits_BV, top_p=1e-6), logits_BV.argmax(-1))


def test_impossible_tokens_are_never_drawn():
    logits_BV = torch.full((5000, 200), float("-inf"))
    logits_BV[:, 17] = 0.0
    logits_BV[:, 90] = -1.0
    assert set(draw(logits_BV).tolist()) == {17, 90}


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_what_the_likeliest_tokens_settle_is_what_all_settle(spread, top_k):
    logits_BV = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)) * spread
    temperature_B = torch.tensor([0.0, 0.6, 1.0, 1.5]).repeat(16)
    settings = Settings(
        temperature_B, torch.full((64,), 0.95), torch.full((64,), top_k), torch.zeros(64), torch.arange(64)
    )
    drawn_B, sure_B = sample_likely(logits_BV, settings, torch.zeros(64, dtype=torch.long))
    expected_B = sample(logits_BV, settings, torch.zeros(64, dtype=torch.long))
    assert torch.equal(drawn_B[sure_B], expected_B[sure_B])
    assert sure_B[temperature_B == 0].all()
    assert sure_B.all() == (top_k > 0 or spread > 3)  # flat distributions reach past 64 tokens

"""Scores against the plain computation, one pair at a time, whatever shares rows and batches with it."""

import random

import pytest
import torch

from teacher import load_model, scoring
from teacher.scoring import score
from tests.teacher.random_configs import random_config
from tests.tiny import deepseek_config


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_model(deepseek_config())


@torch.inference_mode()
def plain(model, context, continuation, max_length):
    """By the definition: lm-eval's HFLM for one request."""
    inputs = (list(context) + list(continuation))[-(max_length + 1) :][:-1]
    logprobs = model(torch.tensor([inputs])).logits[0, -len(continuation) :].float().log_softmax(-1)
    target = torch.tensor(continuation)
    return float(logprobs.gather(1, target[:, None]).sum()), bool((logprobs.argmax(-1) == target).all())


def check(model, pairs, max_length=512, **settings):
    found = dict(score(model, pairs, max_length, **settings))
    assert sorted(found) == list(range(len(pairs)))
    for index, (context, continuation) in enumerate(pairs):
        logprob, greedy = plain(model, context, continuation, max_length)
        assert found[index].logprob == pytest.approx(logprob, abs=2e-4, rel=1e-5), index
        assert found[index].greedy == greedy, index
    return found


def tokens(rng, count, vocabulary):
    return [rng.randrange(vocabulary) for _ in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_of_pairs_scores_as_each_alone(seed):
    rng = random.Random(seed)
    config = random_config(seed)
    torch.manual_seed(seed)
    model = load_model(config)
    pairs = []
    for _ in range(6):
        context = tokens(rng, rng.choice([1, 3, 40]), config.vocab_size)
        for _ in range(rng.randint(1, 5)):
            pairs.append((context, tokens(rng, rng.choice([1, 1, 2, 30]), config.vocab_size)))
    pairs.append(pairs[0])  # the same request twice
    pairs.append((pairs[0][0], [*pairs[0][1], 0]))  # a continuation that begins with another
    rng.shuffle(pairs)
    check(model, pairs, max_length=200, batch_tokens=rng.choice([1, 100, None]))


def test_what_the_model_would_say_is_greedy(model):
    context = [1, 2, 3]
    said = list(context)
    with torch.inference_mode():
        for _ in range(5):
            said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
    continuation = said[3:]
    other = [*continuation[:-1], (continuation[-1] + 1) % 263]
    found = check(model, [(context, continuation), (context, other), (context, continuation[:1])])
    assert [found[n].greedy for n in range(3)] == [True, False, True]


def test_too_long_a_pair_loses_the_beginning_of_its_context(model):
    rng = random.Random(1)
    context = tokens(rng, 40, 263)
    pairs = [(context, tokens(rng, size, 263)) for size in (1, 1, 5, 9, 24)]
    found = check(model, pairs, max_length=24)
    whole = dict(score(model, pairs))
    assert all(abs(found[n].logprob - whole[n].logprob) > 1e-3 for n in range(5))


def test_continuations_of_one_context_share_it(model, monkeypatch):
    computed = []
    inner = scoring._hidden

    def counted(model, ids_RT, *rest):
        computed.append(ids_RT.numel())
        return inner(model, ids_RT, *rest)

    monkeypatch.setattr(scoring, "_hidden", counted)
    rng = random.Random(2)
    context = tokens(rng, 100, 263)
    check(model, [(context, tokens(rng, 6, 263)) for _ in range(4)])
    assert computed == [100 + 4 * 5]
    computed.clear()
    check(model, [(context, [letter]) for letter in (65, 66, 67, 68)])
    assert computed == [100]


def test_a_context_with_very_many_or_long_branches_is_split_over_rows(model, monkeypatch):
    monkeypatch.setattr(scoring, "_SHORT", 30)
    monkeypatch.setattr(scoring, "_LONG", 60)
    rng = random.Random(3)
    context = tokens(rng, 12, 263)
    pairs = [(context, tokens(rng, size, 263)) for size in (10, 10, 10, 4, 60, 2)]
    rows = scoring._rows(pairs, 512)
    assert max(len(row.tokens) for row in rows if len(row.reads) > 1) <= 30
    assert len(rows) < len(pairs)
    check(model, pairs)


def test_logits_are_made_a_few_at_a_time(model, monkeypatch):
    monkeypatch.setattr(scoring, "_LOGITS", 3 * 263)
    check(model, [([1, 2], [3, 4, 5, 6, 7]), ([9], [8])])


def test_bfloat16_weights_give_fp32_log_probabilities():
    torch.manual_seed(0)
    model = load_model(deepseek_config(), dtype="bfloat16")
    pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6, 7])]
    found = dict(score(model, pairs))
    exact = dict(score(model.float(), pairs))
    assert all(found[n].logprob == pytest.approx(exact[n].logprob, rel=0.05) for n in range(2))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([1], [2]), ([], [1])], "pair 1 has an empty context"),
        ([([1], [])], "pair 0 has an empty continuation"),
        ([([1], [2] * 9)], "pair 0 has a continuation of 9 tokens; the limit is 8"),
    ],
)
def test_pairs_that_cannot_be_scored(model, pairs, message):
    with pytest.raises(ValueError, match=message):
        list(score(model, pairs, max_length=8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_scores(model):
    rng = random.Random(4)
    context = tokens(rng, 50, 263)
    pairs = [(context, tokens(rng, size, 263)) for size in (1, 7, 20)] + [([5], [6, 7])]
    on_cpu = dict(score(model, pairs))
    on_gpu = dict(score(model.to("cuda"), pairs))
    model.to("cpu")
    assert all(on_gpu[n].logprob == pytest.approx(on_cpu[n].logprob, abs=1e-2) for n in range(4))

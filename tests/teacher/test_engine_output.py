"""What a request gets back: updates as it goes, text, stop strings, log-probabilities."""

import math

import pytest
import torch

from teacher import load_model
from teacher.engine import Engine
from teacher.requests import Request
from tests.teacher.random_configs import randomize
from tests.tiny import deepseek_config, tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = load_model(deepseek_config())
    randomize(model, 0)
    return model


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def run(engine, *requests):
    """Updates by request, until all have ended."""
    for request in requests:
        engine.add(request)
    found = {request.id: [] for request in requests}
    while engine.has_work:
        for update in engine.step():
            found[update.id].append(update)
    return found


@pytest.mark.parametrize("speculate", [0, 2])
def test_streamed_updates_add_up_to_the_completion(model, words, speculate):
    request = Request("a", [1, 2, 3], max_tokens=30, temperature=0.9, seed=4, stream=True, text=True, logprobs=2)
    updates = run(Engine(model, words, 2, 80, speculate=speculate), request)["a"]
    done = updates[-1].completion
    assert len(updates) > 5 and all(update.completion is None for update in updates[:-1])
    assert [token for update in updates for token in update.token_ids] == done.token_ids
    assert "".join(update.text for update in updates) == done.text
    assert done.text == words.decode(done.token_ids, skip_special_tokens=False)
    assert [entry for update in updates for entry in update.logprobs] == done.logprobs
    assert len(done.logprobs) == len(done.token_ids)


def test_a_request_that_does_not_stream_gets_one_update(model, words):
    updates = run(Engine(model, words, 2, 80), Request("a", [1, 2], max_tokens=9, stop_ids=[], text=True))["a"]
    assert len(updates) == 1 and len(updates[0].token_ids) == 9 and updates[0].text == updates[0].completion.text


def test_logprobs_are_the_models_own(model):
    request = Request("a", [9, 8, 7], max_tokens=12, temperature=0.3, top_k=3, seed=1, stop_ids=[], logprobs=5)
    (done,) = Engine(model, 257, 2, 80).generate([request])
    ids = torch.tensor([[9, 8, 7, *done.token_ids]])
    with torch.no_grad():
        expected_TV = model(ids).logits[0, 2:-1].log_softmax(-1)
    for position, (token, entry) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        assert math.isclose(entry.logprob, float(expected_TV[position, token]), abs_tol=1e-4)
        top = expected_TV[position].topk(5)
        assert [token for token, _ in entry.top] == top.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    (bare,) = Engine(model, 257, 2, 80).generate([Request("a", [9], max_tokens=2, stop_ids=[], logprobs=0)])
    assert [entry.top for entry in bare.logprobs] == [[], []]


@pytest.mark.parametrize("speculate", [0, 2])
def test_samples_of_one_prompt_have_a_logprob_for_each_token(model, speculate):
    prompt = list(range(20))
    batch = [Request(f"{n}", prompt, seed=n, max_tokens=6, stop_ids=[], logprobs=n % 2) for n in range(4)]
    for done in Engine(model, 257, 4, 80, speculate=speculate).generate(batch):
        with torch.no_grad():
            expected_TV = model(torch.tensor([[*prompt, *done.token_ids]])).logits[0, 19:-1].log_softmax(-1)
        expected = expected_TV.gather(1, torch.tensor(done.token_ids).unsqueeze(1)).squeeze(1).tolist()
        assert [entry.logprob for entry in done.logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("speculate", [0, 3])
def test_stop_string_ends_the_text_before_it(model, words, speculate):
    free = Request("free", [5, 6, 7], max_tokens=40, temperature=1.0, seed=3, stop_ids=[], text=True)
    (whole,) = Engine(model, words, 1, 80).generate([free])
    stop = whole.text[12:15]
    first = whole.text.index(stop)
    request = Request(
        "a", [5, 6, 7], max_tokens=40, temperature=1.0, seed=3, stop_ids=[], stop=["never there", stop], stream=True,
        logprobs=1,
    )  # fmt: skip
    updates = run(Engine(model, words, 1, 80, speculate=speculate), request)["a"]
    done = updates[-1].completion
    assert (done.finish_reason, done.stop_text, done.stop_id) == ("stop", stop, None)
    assert done.text == whole.text[:first] == "".join(update.text for update in updates)
    # The tokens go as far as the one that completed the stop string, and no further.
    assert done.token_ids == whole.token_ids[: len(done.token_ids)]
    assert stop in words.decode(done.token_ids) and stop not in words.decode(done.token_ids[:-1])
    assert len(done.logprobs) == len(done.token_ids)


def test_text_is_whole_when_length_ends_it_in_the_middle_of_a_stop_string(model, words):
    free = Request("free", [5, 6, 7], max_tokens=10, temperature=1.0, seed=3, stop_ids=[], text=True)
    (whole,) = Engine(model, words, 1, 80).generate([free])
    request = Request(
        "a", [5, 6, 7], max_tokens=10, temperature=1.0, seed=3, stop_ids=[], stop=[whole.text[-1] + "more"]
    )
    (done,) = Engine(model, words, 1, 80).generate([request])
    assert (done.finish_reason, done.text) == ("length", whole.text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": 264}, "logprobs is 264; expected 0 to 263"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_impossible_settings_are_named(model, words, changes, message):
    engine = Engine(model, words, 2, 80)
    with pytest.raises(ValueError, match="request 'x' cannot be served") as error:
        engine.add(Request(**({"id": "x", "prompt_ids": [1]} | changes)))
    assert message in str(error.value)
    assert not engine.has_work


def test_text_without_a_tokenizer_is_refused(model):
    with pytest.raises(ValueError, match="need an engine with a tokenizer"):
        Engine(model, 257, 2, 80).add(Request("x", [1], stop=["a"]))


def test_two_live_requests_of_one_name_are_refused(model):
    engine = Engine(model, 257, 2, 80)
    engine.add(Request("x", [1], max_tokens=3))
    with pytest.raises(ValueError, match="request 'x' cannot be served: another with this id has not ended"):
        engine.add(Request("x", [2]))
    while engine.has_work:
        engine.step()
    engine.add(Request("x", [2], max_tokens=2))


@pytest.mark.parametrize("settings", [{"speculate": -1}, {"page_size": 0}, {"prefill_tokens": 0}, {"cache_tokens": 1}])
def test_impossible_engine_settings_are_named(model, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Engine(model, 257, 2, 80, **settings)


def test_speculation_without_mtp_weights_is_refused():
    with pytest.raises(ValueError, match="speculate is 2; expected 0 without MTP weights"):
        Engine(load_model(deepseek_config(num_nextn_predict_layers=0)), 257, 2, 80, speculate=2)

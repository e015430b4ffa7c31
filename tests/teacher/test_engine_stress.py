"""The engine under thousands of random moves: requests come, are cancelled and end, in caches too small for them."""

import random
import warnings

import pytest
import torch

from teacher import load_model
from teacher.engine import Engine
from teacher.requests import Request
from tests.teacher.plain_engine import complete
from tests.teacher.random_configs import randomize
from tests.tiny import deepseek_config, tokenizer

MAX_LEN, MOST = 64, 30
SETTINGS = [
    {"batch_size": 5, "cache_tokens": 72, "page_size": 4, "prefill_tokens": 6},
    {"batch_size": 8, "cache_tokens": 96, "page_size": 8, "prefill_tokens": 19, "speculate": 2, "speculate_rows": 4},
    {"batch_size": 6, "cache_tokens": 70, "page_size": 1, "prefill_tokens": 7, "speculate": 3},
    {"batch_size": 60, "cache_tokens": 400, "page_size": 4, "prefill_tokens": 90, "threads": 3, "speculate": 1},
    {"batch_size": 60, "cache_tokens": 288, "page_size": 16, "threads": 3},
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = load_model(deepseek_config())
    randomize(model, 0)
    return model


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def subjects(model):
    """Requests that share beginnings, or all of the prompt, each with its whole continuation by the plain engine."""
    rng = random.Random(0)
    stem = [rng.randrange(250) for _ in range(40)]
    found = []
    for number in range(24):
        prompt = stem[: rng.choice([1, 7, 8, 16, 17, 20, 20, 20, 33])]
        if rng.random() < 0.3:
            prompt = [*prompt, *(rng.randrange(250) for _ in range(rng.randint(1, 9)))]
        if number % 5 == 4:  # a later turn: what another has drawn is part of the prompt
            earlier, drawn = rng.choice(found)
            prompt = [*earlier.prompt_ids, *drawn[: rng.randint(1, 6)]]
        request = Request(
            "", prompt, temperature=rng.choice([0.0, 0.7, 1.0]), top_p=rng.choice([0.8, 1.0]),
            top_k=rng.choice([0, 0, 20]), seed=number, max_tokens=MOST, stop_ids=[],
        )  # fmt: skip
        found.append((request, complete(model, request, []).token_ids))
    return found


def expected(request, whole, words):
    """What the engine must answer: tokens, finish reason, stop token, stop string."""
    tokens = whole[: min(request.max_tokens, MAX_LEN - len(request.prompt_ids))]
    for count in range(1, len(tokens) + 1):
        if tokens[count - 1] in request.stop_ids:
            return tokens[: count - 1], "stop", tokens[count - 1], None
        text = words.decode(tokens[:count], skip_special_tokens=False)
        ended = [stop for stop in request.stop if stop in text]
        if ended:
            return tokens[:count], "stop", None, max(ended, key=len)
    return tokens, "length", None, None


def random_request(rng, name, subjects, words):
    request, whole = rng.choice(subjects)
    changes = {"id": name, "max_tokens": rng.randint(1, MOST), "stream": rng.random() < 0.3}
    if rng.random() < 0.3:
        changes["stop_ids"] = rng.sample(whole, 2)
    if rng.random() < 0.2:
        text = words.decode(whole, skip_special_tokens=False)
        at = rng.randrange(len(text) - 2)
        # U+FFFD may be half a character: whether it is in the text is not certain before the next token.
        changes["stop"] = ["never there", *([] if "\ufffd" in text[at : at + 2] else [text[at : at + 2]])]
    if rng.random() < 0.2:
        changes["logprobs"] = rng.choice([0, 2])
    return Request(**(vars(request) | changes)), whole


def check_books(engine):
    """Pages and slots are each in one place, and the index knows a page by one name."""
    scheduler, pool, slots = engine._scheduler, engine._pool, engine._slots
    followers = [sequence for others in scheduler._followers.values() for sequence in others]
    inside = [*scheduler.running, *scheduler.prefilling, *followers]
    assert len(inside) + len(scheduler.waiting) == len(engine._live)
    assert sorted([sequence.slot for sequence in inside] + scheduler._free) == list(range(engine.batch_size))
    assert all(sequence.slot == -1 for sequence in scheduler.waiting)
    holders = [0] * (pool.pages + 1)
    for sequence in inside:
        for page in slots.pages(sequence.slot):
            holders[page] += 1
    assert holders == pool._holders and holders[0] == 0
    blank, idle = set(pool._blank), set(pool._idle)
    assert len(blank) == len(pool._blank) and not blank & idle
    assert blank | idle == {page for page in range(1, pool.pages + 1) if holders[page] == 0}
    assert {page: key for key, page in pool._page_of.items()} == pool._key_of and idle <= set(pool._key_of)
    assert len(pool._page_of) == len(pool._key_of) == len(pool._serial_of)


def stress(engine, subjects, words, seed, moves):
    """Random moves; returns every answer, in the order of ending, and checks each."""
    rng = random.Random(seed)
    live, shown, answers, count = {}, {}, [], 0
    cancelled = set()
    most = 2 * engine.batch_size
    while count < moves or engine.has_work:
        if count < moves and len(live) < most and rng.random() < 0.7:
            for _ in range(rng.choice([1, 1, 4])):
                request, whole = random_request(rng, f"r{count}", subjects, words)
                engine.add(request)
                live[request.id], shown[request.id] = (request, whole), ([], "", [])
                count += 1
        if live and rng.random() < 0.1:
            name = rng.choice(sorted(live))
            assert engine.cancel(name)
            cancelled.add(name)
        if count < moves and rng.random() < 0.2:
            continue
        for update in engine.step():
            request, whole = live[update.id]
            tokens, text, logprobs = shown[update.id]
            shown[update.id] = tokens, text, logprobs = (
                tokens + update.token_ids, text + update.text, logprobs + update.logprobs
            )  # fmt: skip
            done = update.completion
            if done is None:
                assert request.stream
                continue
            del live[update.id]
            found = done.token_ids, done.finish_reason, done.stop_id, done.stop_text
            answers.append((done.id, found))
            wanted = expected(request, whole, words)
            if done.finish_reason == "cancelled":
                assert done.id in cancelled and done.token_ids == wanted[0][: len(done.token_ids)]
            else:
                assert found == wanted, request
            assert tokens == done.token_ids and logprobs == (done.logprobs or [])
            if request.logprobs is not None:
                assert len(done.logprobs) == len(tokens)
            if request.stop:
                assert text == done.text == words.decode(tokens).partition(done.stop_text or "never there")[0]
        check_books(engine)
    assert not live and len(answers) == len({name for name, _ in answers}) == count
    assert engine.stats().cache_tokens_used == 0 and not engine._scheduler._leaders and not engine._scheduler._followers
    return answers


@pytest.mark.parametrize("native", [True, False], ids=["c", "torch"])
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_every_request_ends_once_and_as_it_would_alone(model, words, subjects, number, native):
    engine = Engine(model, words, max_len=MAX_LEN, **SETTINGS[number], native=native)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = stress(engine, subjects, words, number, 100 if native else 50)
        if native:  # the same again, in the order of the first time
            engine = Engine(model, words, max_len=MAX_LEN, **SETTINGS[number])
            assert stress(engine, subjects, words, number, 100) == first
    assert engine.stats().preempted > 0 and engine.stats().cached_prompt_tokens > 0

"""The engine against a loop that recomputes everything, and against itself in other batches."""

import dataclasses
import random
from collections import Counter

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


def requests(count, seed=0, **fixed):
    rng = random.Random(seed)
    return [
        Request(
            **(
                {
                    "id": f"r{number}",
                    "prompt_ids": [rng.randrange(263) for _ in range(rng.randint(1, 30))],
                    "temperature": rng.choice([0.0, 0.6, 1.0]),
                    "top_p": rng.choice([0.9, 1.0]),
                    "top_k": rng.choice([0, 5]),
                    "max_tokens": rng.randint(1, 40),
                    "seed": number,
                    "stop_ids": rng.choice([None, [5, 6, 7, 8, 9], []]),
                }
                | fixed
            )
        )
        for number in range(count)
    ]


def generate(model, batch, batch_size, max_len=80):
    return {completion.id: completion for completion in Engine(model, 257, batch_size, max_len).generate(batch)}


def greedy_loop(model, request, default_stop):
    """Greedy decoding by the book: the whole sequence again for every token."""
    tokens = list(request.prompt_ids)
    stops = default_stop if request.stop_ids is None else request.stop_ids
    with torch.no_grad():
        for _ in range(request.max_tokens):
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if token in stops:
                return tokens[len(request.prompt_ids) :], "stop"
            tokens.append(token)
    return tokens[len(request.prompt_ids) :], "length"


def test_greedy_equals_the_plain_loop_with_more_requests_than_slots(model):
    batch = requests(25, temperature=0.0)
    found = generate(model, batch, batch_size=4)
    assert len(found) == 25
    for request in batch:
        completion = found[request.id]
        assert (completion.token_ids, completion.finish_reason) == greedy_loop(model, request, [257])
        assert completion.prompt_tokens == len(request.prompt_ids)
    assert {completion.finish_reason for completion in found.values()} == {"stop", "length"}


def test_result_does_not_depend_on_the_batch(model):
    batch = requests(40)
    alone = generate(model, batch, batch_size=1)
    for batch_size in (3, 64):
        together = generate(model, random.Random(batch_size).sample(batch, 40), batch_size)
        assert {key: value.token_ids for key, value in together.items()} == {
            key: value.token_ids for key, value in alone.items()
        }


def test_samples_of_one_prompt_differ_by_seed_alone(model):
    batch = [Request(str(seed), [1, 2, 3], temperature=1.0, top_p=1.0, max_tokens=20, seed=seed % 8, stop_ids=[])
             for seed in range(16)]  # fmt: skip
    found = generate(model, batch, batch_size=5)
    texts = [tuple(found[str(number)].token_ids) for number in range(16)]
    assert texts[:8] == texts[8:]
    assert len(set(texts[:8])) == 8


def test_every_request_finishes_once_as_it_is_done(model):
    batch = requests(30, temperature=0.0, stop_ids=[])
    batch[0] = Request("long", [1], temperature=0.0, max_tokens=70, stop_ids=[])
    order = [completion.id for completion in Engine(model, 257, 6, 80).generate(batch)]
    assert Counter(order) == Counter(request.id for request in batch)
    assert order.index("long") > 15  # the others went on around it


def test_requests_are_read_as_slots_become_free(model):
    read = []

    def endless():
        for number in range(10**9):
            read.append(number)
            yield Request(str(number), [number % 200], temperature=0.0, max_tokens=3, stop_ids=[])

    completions = Engine(model, 257, 4, 80).generate(endless())
    for _ in range(10):
        next(completions)
    assert len(read) <= 16


def test_two_generations_of_one_engine_do_not_disturb_each_other(model):
    engine = Engine(model, 257, 3, 80)
    batch = requests(12)
    alone = {completion.id: completion.token_ids for completion in engine.generate(batch)}
    again = [dataclasses.replace(request, id=f"{request.id} again") for request in batch]
    first, second = engine.generate(batch), engine.generate(again[::-1])
    found = [completion for pair in zip(first, second, strict=True) for completion in pair]
    assert len(found) == 24
    assert all(completion.token_ids == alone[completion.id.removesuffix(" again")] for completion in found)


def test_what_a_closed_generation_left_does_not_reach_the_next(model):
    engine = Engine(model, 257, 8, 80)
    for tokens in (3, 5):  # in the first round all end in one step, and all but one of them are not taken
        most = [tokens + (tokens > 3) * number for number in range(4)]
        first = engine.generate(Request(f"{n}", [n], max_tokens=most[n], stop_ids=[]) for n in range(4))
        next(first)
        first.close()
        again = [Request(f"{n}", [n, 7], max_tokens=6, stop_ids=[]) for n in range(4)]
        assert [len(completion.token_ids) for completion in engine.generate(again)] == [6] * 4
    assert not engine._ended and not engine._awaited


def test_a_step_that_somebody_else_does_is_not_lost_to_a_generation(model):
    engine = Engine(model, 257, 8, 80)
    generation = engine.generate(Request(f"{n}", [n], max_tokens=4 + 4 * n, stop_ids=[]) for n in range(2))
    assert next(generation).id == "0"
    while engine.has_work:
        engine.step()
    assert [completion.id for completion in generation] == ["1"]


def test_a_request_does_not_wait_long_beside_a_free_slot(model):
    engine = Engine(model, 257, 64, 500)  # new ones enter four at a time while others run
    for number in range(62):
        engine.add(Request(f"{number}", [number], max_tokens=400, stop_ids=[]))
    engine.step()
    engine.add(Request("late", [1], max_tokens=2, stop_ids=[]))
    steps = 1
    while not any(update.id == "late" for update in engine.step()):
        steps += 1
    assert 20 < steps < 40


def test_completion_ends_where_the_slot_is_full(model):
    (completion,) = generate(model, [Request("r", [4] * 70, max_tokens=50, stop_ids=[])], 2, max_len=80).values()
    assert (completion.finish_reason, completion.stop_id, len(completion.token_ids)) == ("length", None, 10)


def test_stop_token_is_reported_and_not_part_of_the_text(model):
    free = generate(model, [Request("r", [9, 9], temperature=0.0, max_tokens=10, stop_ids=[])], 1)["r"].token_ids
    stop = free[4]
    found = generate(model, [Request("r", [9, 9], temperature=0.0, max_tokens=10, stop_ids=[300, stop])], 1)["r"]
    assert found.token_ids == free[: free.index(stop)]
    assert (found.finish_reason, found.stop_id) == ("stop", stop)


def test_stop_ids_that_are_no_tokens_are_never_drawn(model):
    odd = Request("r", [9, 9], max_tokens=5, stop_ids=[2**70, -1, 10**6])
    assert generate(model, [odd], 1)["r"].finish_reason == "length"


def test_default_stop_ids(model):
    assert Engine(model, tokenizer(), 1).stop_ids == [257]
    assert Engine(model, None, 1).stop_ids == [257]
    assert Engine(model, [3, 4], 1).stop_ids == [3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": []}, "prompt is empty"),
        ({"prompt_ids": [1] * 80}, "prompt has 80 tokens; expected fewer than max_len"),
        ({"prompt_ids": [263]}, "outside the vocabulary of 263"),
        ({"prompt_ids": [-1]}, "outside the vocabulary"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2**70}, "64-bit integer"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"seed": 2**64}, "seed is"),
    ],
)
def test_impossible_request_is_named(model, changes, message):
    request = Request(**({"id": "x7", "prompt_ids": [1, 2]} | changes))
    with pytest.raises(ValueError, match="request 'x7' cannot be served") as error:
        generate(model, [request], 2)
    assert message in str(error.value)


def test_impossible_engine_is_refused(model):
    with pytest.raises(ValueError, match="max_len is 1000; expected 2 to 512"):
        Engine(model, 257, 2, 1000)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Engine(model, 257, 0)
    with pytest.raises(ValueError, match="threads is 0"):
        Engine(model, 257, 2, threads=0)


def test_bf16_model_generates(model):
    half = load_model(deepseek_config(), dtype="bfloat16")
    found = generate(half, requests(6, stop_ids=[], max_tokens=12), batch_size=4)
    assert [len(completion.token_ids) for completion in found.values()] == [12] * 6

"""The engine under pressure: small caches, shared prefixes, chunks, preemption, cancellation."""

import random
import threading

import pytest
import torch

from teacher import load_model
from teacher.engine import Engine
from teacher.requests import Request
from tests.teacher.plain_engine import complete
from tests.teacher.random_configs import randomize
from tests.tiny import deepseek_config


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = load_model(deepseek_config())
    randomize(model, 0)
    return model


@pytest.fixture(params=["c", "torch"])
def native(request):
    return request.param == "c"


def requests(count, seed=0, shared=20, most=50):
    rng = random.Random(seed)
    stem = [rng.randrange(250) for _ in range(shared)]
    return [
        Request(
            f"r{number}", [*stem, *(rng.randrange(250) for _ in range(number // 4 % 5 * 3 + 1))],
            temperature=rng.choice([0.0, 0.8]), top_p=0.9, max_tokens=rng.randint(1, most), seed=number,
        )
        for number in range(count)
    ]  # fmt: skip


def tokens(engine, batch):
    return {completion.id: completion.token_ids for completion in engine.generate(batch)}


def plain(model, batch):
    return {request.id: complete(model, request, [257]).token_ids for request in batch}


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_tokens": 80, "page_size": 8},  # room for one long sequence: the others are preempted
        {"cache_tokens": 400, "page_size": 16},
        {"prefill_tokens": 5},  # prompts in many chunks
        {"prefill_tokens": 7, "cache_tokens": 160, "page_size": 4, "speculate": 2, "speculate_rows": 3},
        {"page_size": 1},
        {"threads": 3, "batch_size": 60},
    ],
)
def test_tight_settings_change_nothing(model, native, settings):
    batch = requests(60 if "threads" in settings else 18)
    engine = Engine(model, 257, **({"batch_size": 6, "max_len": 80} | settings), native=native)
    assert tokens(engine, batch) == tokens(Engine(model, 257, 64, 80, native=False), batch)
    if settings.get("cache_tokens", 999) < 200:
        assert engine.stats().preempted > 0
    assert engine.stats().cache_tokens_used == 0 and not engine.has_work


def test_batched_shared_and_preempted_equals_one_at_a_time(model):
    batch = requests(8, seed=3, most=12)
    assert tokens(Engine(model, 257, 4, 60, cache_tokens=96, page_size=8), batch) == plain(model, batch)


def test_samples_of_a_problem_compute_its_prompt_once(model, native):
    prompt = list(range(37))
    batch = [Request(f"{n}", prompt, seed=n, max_tokens=5, temperature=1.0, stop_ids=[]) for n in range(6)]
    engine = Engine(model, 257, 8, 80, native=native)
    ran = []
    forward = engine._runners[0].forward
    engine._runners[0].forward = lambda batch, wanted: ran.append(len(batch.tokens_N)) or forward(batch, wanted)
    done = list(engine.generate(batch))
    assert ran[0] == 37 and max(ran[1:], default=0) <= 6
    assert sorted(completion.cached_tokens for completion in done) == [0, 37, 37, 37, 37, 37]
    assert len({tuple(completion.token_ids) for completion in done}) > 1


@pytest.mark.parametrize("chunk", range(15, 22))
def test_samples_share_a_prompt_however_its_chunks_fall(model, native, chunk):
    """Among them a last chunk of one token, which looks like a sequence that has drawn."""
    batch = [Request(f"{n}", list(range(20)), seed=n, max_tokens=6, temperature=1.0) for n in range(3)]
    engine = Engine(model, 257, 8, 80, prefill_tokens=chunk, native=native)
    assert tokens(engine, batch) == tokens(Engine(model, 257, 1, 80, native=False), batch)


def test_a_later_turn_finds_the_earlier_one(model, native):
    engine = Engine(model, 257, 4, 200, page_size=8, native=native)
    (first,) = engine.generate([Request("a", list(range(30)), max_tokens=20, stop_ids=[])])
    turn = [*range(30), *first.token_ids, 5, 6, 7]
    (second,) = engine.generate([Request("b", turn, max_tokens=10, temperature=0.0, stop_ids=[])])
    assert second.cached_tokens == 48  # 49 of 50 tokens were in the cache, in pages of 8
    (fresh,) = Engine(model, 257, 4, 200).generate([Request("b", turn, max_tokens=10, temperature=0.0, stop_ids=[])])
    assert second.token_ids == fresh.token_ids


def test_speculation_changes_no_token(model, native):
    batch = requests(24, seed=5)
    expected = tokens(Engine(model, 257, 8, 80, native=False), batch)
    for drafts in (1, 3):
        for rows in (2, 8):  # on all the time, and on and off as the batch shrinks
            engine = Engine(model, 257, 8, 80, speculate=drafts, speculate_rows=rows, native=native)
            assert tokens(engine, batch) == expected
            stats = engine.stats()
            assert stats.drafted > 0 and stats.accepted <= stats.drafted


def test_drafts_behind_a_shared_prompt_are_as_good_as_behind_ones_own(native):
    model = load_model("teacher/models/tiny-r1", dtype="float32")
    engine = Engine(model, 399, 1, 400, speculate=3, native=native)
    prompt = [398, *(37 * n % 390 for n in range(70))]
    counts = []
    for number in range(3):
        (done,) = engine.generate([Request(f"{number}", prompt, max_tokens=80, seed=1, stop_ids=[])])
        assert done.cached_tokens == (64 if number else 0)
        counts.append((engine.stats().drafted, engine.stats().accepted))
    assert counts[2] == tuple(3 * n for n in counts[0]) and counts[0][1] > 0


def test_drafts_of_a_model_that_repeats_itself_are_accepted():
    """A model whose layers do nothing, so that draft and model agree: every step brings all it can."""
    torch.manual_seed(1)
    model = load_model(deepseek_config())
    with torch.no_grad():
        for layer in (*model.main_layers, *model.mtp_layers):
            layer.self_attn.o_proj.weight.zero_()
            for name, parameter in layer.mlp.named_parameters():
                if "down" in name:
                    parameter.zero_()
        module = model.mtp_layers[0]
        module.eh_proj.weight.copy_(torch.cat((torch.eye(32), torch.zeros(32, 32)), dim=1))
    engine = Engine(model, 257, 1, 400, speculate=3)
    (done,) = engine.generate([Request("a", [1, 2, 3], max_tokens=200, temperature=0.7, stop_ids=[])])
    stats = engine.stats()
    assert len(done.token_ids) == 200
    assert stats.accepted / stats.drafted > 0.97


def test_cancelled_request_ends_and_the_others_go_on(model, native):
    batch = requests(10, seed=2)
    expected = tokens(Engine(model, 257, 16, 80), batch)
    engine = Engine(model, 257, 3, 80, native=native)
    for request in batch:
        engine.add(request)
    found = {}
    for step in range(500):
        if step == 2:
            assert engine.cancel("r0") and engine.cancel("r9") and not engine.cancel("nobody")
        for update in engine.step():
            found[update.id] = update.completion
        if not engine.has_work:
            break
    assert found["r9"].finish_reason == "cancelled" and found["r9"].token_ids == []
    assert found["r0"].token_ids == expected["r0"][: len(found["r0"].token_ids)]
    assert {name: found[name].token_ids for name in expected if name not in ("r0", "r9")} == {
        name: value for name, value in expected.items() if name not in ("r0", "r9")
    }
    assert engine.stats().cache_tokens_used == 0


def test_cancelling_a_sequence_that_waits_for_its_leader(model):
    engine = Engine(model, 257, 8, 80, prefill_tokens=4)
    for number in range(3):
        engine.add(Request(f"{number}", list(range(20)), max_tokens=4, stop_ids=[], seed=number))
    engine.step()  # the prompt is half done: one computes it, two wait for it
    engine.cancel("1")
    engine.step()
    engine.cancel("0")
    done = {}
    while engine.has_work:
        done |= {update.id: update.completion for update in engine.step()}
    assert len(done["2"].token_ids) == 4
    assert engine.stats().cache_tokens_used == 0


def test_closing_a_generation_early_frees_its_slots(model):
    engine = Engine(model, 257, 4, 80)
    generation = engine.generate(requests(12))
    next(generation)
    generation.close()
    while engine.has_work:
        engine.step()
    assert engine.stats().cache_tokens_used == 0


def test_prompt_larger_than_the_cache_is_refused_by_name(model):
    engine = Engine(model, 257, 4, 80, cache_tokens=32)
    with pytest.raises(ValueError, match="request 'big' cannot be served: its prompt has 40 tokens; expected fewer"):
        engine.add(Request("big", list(range(40))))
    (done,) = engine.generate([Request("small", [1, 2, 3], max_tokens=500, stop_ids=[])])
    assert (done.finish_reason, len(done.token_ids)) == ("length", 29)


def test_requests_added_between_steps_join_the_batch(model):
    engine = Engine(model, 257, 8, 80)
    expected = plain(model, requests(6, seed=8, most=10))
    pending, found = requests(6, seed=8, most=10), {}
    while pending or engine.has_work:
        if pending:
            engine.add(pending.pop())
        found |= {update.id: update.completion.token_ids for update in engine.step()}
    assert found == expected


def test_two_engines_in_two_threads(model):
    batch = requests(12, seed=4)
    expected = tokens(Engine(model, 257, 4, 80), batch)
    found = [None, None]

    def work(number):
        found[number] = tokens(Engine(model, 257, 4, 80, threads=1), batch)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected]

"""A round in one recording brings the tokens of plain decoding, with a stand-in for CUDA graphs that runs the work."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from teacher import load_model
from teacher.cache import LatentCache
from teacher.engine import Engine
from teacher.graphs import GraphRunner
from teacher.requests import Request
from teacher.runner import Batch, TorchRunner
from teacher.slots import Slots
from tests.teacher.random_configs import randomize
from tests.tiny import deepseek_config


@pytest.fixture
def rounds(monkeypatch):
    """How each round ended: in one go, or (None) step by step."""
    monkeypatch.setattr("teacher.graphs._record", lambda work, memory: SimpleNamespace(replay=work))
    seen = []

    def counted(runner, slots, rows_B, drafts, round=GraphRunner.round):
        seen.append(round(runner, slots, rows_B, drafts))
        return seen[-1]

    monkeypatch.setattr(GraphRunner, "round", counted)
    return seen


@pytest.fixture
def by_torch(monkeypatch):
    for module in ("rounds", "graphs"):
        monkeypatch.setattr(f"teacher.{module}.obstacle", lambda device: "switched off")


@pytest.fixture(scope="module")
def model():
    """In float32, where a batch's shape changes no draw. The newest token says most of what comes, and the draft
    module passes it on, so that it is often right and often wrong."""
    torch.manual_seed(0)
    made = load_model(deepseek_config())
    randomize(made, 0)
    hidden = made.config.hidden_size
    with torch.no_grad():
        made.lm_head.weight *= 2
        scale = made.model.embed_tokens.weight.square().mean().sqrt()
        made.model.embed_tokens.weight *= 4 / scale
        module = made.mtp_layers[0]
        for norm in (module.enorm, module.shared_head.norm, made.model.norm):
            norm.weight.fill_(1.0)
        module.eh_proj.weight *= 0.1
        module.eh_proj.weight[:, :hidden] += 4 * torch.eye(hidden)
    return made.requires_grad_(False)


def requests(count=10, new=25, **settings):
    rng = np.random.default_rng(1)
    return [
        Request(
            str(number), rng.integers(0, 250, rng.integers(1, 20)).tolist(), max_tokens=int(rng.integers(1, new)),
            seed=number, stop_ids=[7, 9, 11][: number % 4] or [], **({"temperature": 0.0} if number % 3 == 0 else {}),
            **settings,
        )
        for number in range(count)
    ]  # fmt: skip


def answers(model, kind, asked, monkeypatch, **settings):
    with monkeypatch.context() as patched:
        patched.setattr("teacher.engine.runners", lambda model, cache, *rest: [kind(model, cache)])
        engine = Engine(model, 257, **({"batch_size": 4, "max_len": 60, "threads": 1} | settings))
    found = {done.id: (done.token_ids, done.finish_reason, done.stop_id) for done in engine.generate(asked)}
    return found, engine.stats()


@pytest.mark.parametrize(
    ("limits", "settings"),
    [
        ({"top_k": 40}, {}),
        ({"top_k": 20, "min_p": 0.02, "top_p": 0.8}, {"max_len": 40}),  # drafts beyond the last position
        ({"min_p": 0.1}, {"cache_tokens": 90, "page_size": 8, "prefill_tokens": 6}),  # preempted
        ({"top_p": 0.7}, {"speculate_rows": 3}),  # speculating and plain by turns
    ],
)
@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_rounds_change_no_token(model, rounds, by_torch, drafts, limits, settings, monkeypatch):
    plain, _ = answers(model, TorchRunner, requests(**limits), monkeypatch, **settings | {"speculate_rows": 8})
    found, stats = answers(model, GraphRunner, requests(**limits), monkeypatch, speculate=drafts, **settings)
    assert found == plain
    assert sum(kept_B is not None for kept_B in rounds) > 0.8 * len(rounds)
    if drafts:
        assert 0 < stats.accepted < stats.drafted
        assert max(kept_B.max() for kept_B in rounds if kept_B is not None) > 1
    if "cache_tokens" in settings and drafts:
        assert stats.preempted


def test_by_the_kernels_too(model, rounds, monkeypatch):
    asked = requests(4, 10, top_p=1.0)
    plain, _ = answers(model, TorchRunner, asked, monkeypatch)
    assert answers(model, GraphRunner, asked, monkeypatch, speculate=3)[0] == plain
    assert all(kept_B is not None for kept_B in rounds)  # so few tokens are all looked at


def test_the_drafts_are_those_of_single_steps(model, rounds, by_torch, monkeypatch):
    """Drafts change no token, so wrong ones would go unseen: as many must be accepted as step by step."""
    asked = requests(8, 40, top_k=40)
    _, single = answers(model, TorchRunner, asked, monkeypatch, speculate=4)
    _, whole = answers(model, GraphRunner, asked, monkeypatch, speculate=4)
    assert (single.drafted, single.accepted) == (whole.drafted, whole.accepted) and whole.accepted


def test_a_round_whose_draws_are_not_sure_goes_step_by_step(model, rounds, by_torch, monkeypatch):
    """At temperature 3 the likeliest 64 of 263 tokens are not enough for top-p 0.95."""
    asked = [*requests(4, top_p=0.95), Request("hot", [3, 4, 5], temperature=3.0, max_tokens=30, stop_ids=[])]
    plain, _ = answers(model, TorchRunner, asked, monkeypatch)
    assert answers(model, GraphRunner, asked, monkeypatch, speculate=3)[0] == plain
    assert any(kept_B is None for kept_B in rounds)
    rounds.clear()
    assert answers(model, GraphRunner, asked, monkeypatch, speculate=0)[0] == plain
    assert all(kept_B is not None for kept_B in rounds)  # only the draw is done again


def test_a_runner_that_is_let_go_is_freed_at_once(model, by_torch, monkeypatch):
    """Not by the garbage collector, which may come while another engine records, and make that void."""

    def record(work, memory):  # unlike the stand-in, a recording does not keep the work
        work()
        return SimpleNamespace(replay=lambda: None)

    monkeypatch.setattr("teacher.graphs._record", record)
    runner = GraphRunner(model, LatentCache(model.config, 4, 8, 16, torch.float32, torch.device("cpu")))
    slots, rows_B = Slots(2, 60, 16, 2), np.array([1])
    slots.enter(1, Request("a", [3, 4], top_k=40), [3, 4], 60, [])
    slots.cached_S[1] = 1
    batch = Batch(np.array([3], dtype=np.int32), np.array([0]), rows_B, np.array([1]), slots.table_SP)
    hidden_NH = runner.forward(batch, np.array([0]))[1]
    assert runner.round(slots, rows_B, 2) is None and runner.drafts(hidden_NH, slots, rows_B, 2).shape == (1, 2)
    assert runner._rounds and runner._drafts and runner._graphs
    freed = weakref.ref(runner)
    gc.disable()
    try:
        del runner
        assert freed() is None
    finally:
        gc.enable()


def test_cancelled_and_streamed_in_the_middle_of_a_round(model, rounds, by_torch, monkeypatch):
    monkeypatch.setattr("teacher.engine.runners", lambda model, cache, *rest: [GraphRunner(model, cache)])
    engine = Engine(model, 257, 4, 60, threads=1, speculate=4)
    asked = [Request(str(n), [n + 3, 5], max_tokens=40, seed=n, top_k=40, stop_ids=[], stream=n == 1) for n in range(3)]
    for request in asked:
        engine.add(request)
    updates = [update for _ in range(3) for update in engine.step()]
    engine.cancel("0")
    while engine.has_work:
        updates += engine.step()
    done = {update.id: update.completion for update in updates if update.completion is not None}
    streamed = [token for update in updates if update.id == "1" for token in update.token_ids]
    plain, _ = answers(model, TorchRunner, asked, monkeypatch)
    assert streamed == plain["1"][0] and done["2"].token_ids == plain["2"][0]
    assert done["0"].finish_reason == "cancelled"
    assert done["0"].token_ids == plain["0"][0][: len(done["0"].token_ids)] and done["0"].token_ids

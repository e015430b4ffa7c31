"""What goes into a recording and comes out of it, with a stand-in for CUDA graphs that runs the work again."""

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
from tests.teacher.random_configs import randomize
from tests.tiny import deepseek_config


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    made = []

    def record(work, memory):
        work()
        made.append(work)
        return SimpleNamespace(replay=work)

    monkeypatch.setattr("teacher.graphs._record", record)
    return made


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = load_model(deepseek_config())
    randomize(made, 0)
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16()
    return made


def test_padding_and_order_do_not_show(model, recordings):
    table_SP = np.arange(1, 61, dtype=np.int32).reshape(6, 10)
    found = []
    for kind in (TorchRunner, GraphRunner):
        cache = LatentCache(model.config, model.config.num_hidden_layers + 1, 60, 8, torch.bfloat16, "cpu")
        runner, rng, outputs = kind(model, cache), np.random.default_rng(0), []
        at_S = np.zeros(6, dtype=np.int64)
        for rows in ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [5], [0, 2], [0, 1, 2, 3, 4], [3], [1]) * 3:
            rows_B, count_B = np.array(rows), rng.integers(1, 3, len(rows))
            position_N = np.concatenate([np.arange(at_S[r], at_S[r] + n) for r, n in zip(rows, count_B, strict=True)])
            at_S[rows_B] += count_B
            batch = Batch(rng.integers(0, 250, len(position_N)).astype(np.int32), position_N, rows_B, count_B, table_SP)
            wanted_M = np.arange(len(position_N)) if rng.random() < 0.5 else batch.last_B
            logits_MV, hidden_NH = runner.forward(batch, wanted_M)
            outputs += [logits_MV.float().clone(), hidden_NH.float().clone()]
            drafted_MV, out_NH = runner.draft(hidden_NH, batch, np.minimum(position_N[batch.last_B], 1), batch.last_B)
            assert torch.equal(hidden_NH.float(), outputs[-1])  # a draft leaves what it goes on from
            outputs += [drafted_MV.float().clone(), out_NH.float().clone()]
        found.append(outputs)
    assert 5 < len(recordings) < 30
    for plain, graph in zip(*found, strict=True):
        assert plain.shape == graph.shape
        assert (plain - graph).abs().mean() < 0.02 * plain.abs().mean()


@pytest.mark.parametrize("settings", [{}, {"speculate": 3}, {"cache_tokens": 240, "page_size": 8, "prefill_tokens": 6}])
def test_an_engine_generates_the_same(model, settings, monkeypatch):
    rng = np.random.default_rng(1)
    requests = [
        Request(
            str(number), rng.integers(0, 250, rng.integers(1, 20)).tolist(), max_tokens=12, seed=number, stop_ids=[],
            temperature=[0.0, 0.8][number % 2], logprobs=[None, 2][number % 2],
        )
        for number in range(8)
    ]  # fmt: skip

    def answers(kind):
        monkeypatch.setattr("teacher.engine.runners", lambda model, cache, *rest: [kind(model, cache)])
        engine = Engine(model, 257, 4, 60, threads=1, **settings)
        return {done.id: done for done in engine.generate(requests)}

    plain, graph = answers(TorchRunner), answers(GraphRunner)
    # Rounding differs with the shape of a batch: a draw on a border may part a text from there on.
    same = [a.token_ids == graph[name].token_ids for name, a in plain.items()]
    assert sum(same) >= 6
    for name, done in plain.items():
        if done.token_ids == graph[name].token_ids and done.logprobs:
            pairs = zip(done.logprobs, graph[name].logprobs, strict=True)
            assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 0.1

"""The engine on a GPU: the same tokens as on the CPU, by CUDA graphs and without."""

import random

import pytest
import torch

from teacher import load_model
from teacher.engine import Engine
from teacher.requests import Request
from tests.teacher.random_configs import randomize
from tests.tiny import deepseek_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SPECULATING = {"speculate": 3, "speculate_rows": 12}
SETTINGS = [{}, {"cache_tokens": 240, "page_size": 8}, SPECULATING]


def fresh(dtype, device):
    torch.manual_seed(0)
    model = load_model(deepseek_config())
    randomize(model, 0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device)


def requests(count=30):
    rng = random.Random(0)
    return [
        Request(
            f"r{number}", [rng.randrange(250) for _ in range(rng.randint(1, 40))], temperature=rng.choice([0.0, 0.8]),
            max_tokens=rng.randint(1, 60), seed=number,
        )
        for number in range(count)
    ]  # fmt: skip


def tokens(model, **settings):
    engine = Engine(model, 257, **({"batch_size": 12, "max_len": 100} | settings))
    return {completion.id: completion.token_ids for completion in engine.generate(requests())}


@pytest.mark.parametrize("settings", SETTINGS)
def test_float32_gives_the_cpus_tokens(settings):
    expected = tokens(fresh(torch.float32, "cpu"), native=False)
    found = tokens(fresh(torch.float32, "cuda"), **settings)
    # The model is random, its distributions flat: other rounding may move a draw across a border here and there.
    assert sum(found[name] == expected[name] for name in expected) >= len(expected) - 3


@pytest.mark.parametrize("settings", [*SETTINGS, SPECULATING | {"cache_tokens": 300, "page_size": 8}])
def test_graphs_change_next_to_nothing(settings):
    """bf16 rounds differently in another batch shape, so a few sequences may part ways; most must not."""
    model = fresh(torch.bfloat16, "cuda")
    plain, by_graphs = tokens(model, graphs=False), tokens(model, **settings)
    assert by_graphs.keys() == plain.keys()
    assert sum(by_graphs[name][:3] == plain[name][:3] for name in plain) >= 0.8 * len(plain)


@pytest.mark.parametrize("count", [1, 4])
def test_speculation_by_whole_rounds_changes_no_token(count, monkeypatch):
    """tiny-r1 on problems that it knows: rounds in one recording, and the same rounds step by step, against none."""
    from teacher.graphs import GraphRunner
    from tests.bench.engine_gpu import real_prompts

    model = load_model("teacher/models/tiny-r1", dtype="bfloat16", device="cuda")
    prompts = real_prompts(12)
    seen = []

    def counted(runner, slots, rows_B, drafts, round=GraphRunner.round):
        seen.append(round(runner, slots, rows_B, drafts))
        return seen[-1]

    def answers(**settings):
        engine = Engine(model, None, count, 256, **settings)
        asked = [
            Request(str(n), prompt, temperature=[0.6, 0.0][n % 2], max_tokens=100, seed=n)
            for n, prompt in enumerate(prompts)
        ]
        found = {done.id: done.token_ids for done in engine.generate(asked)}
        stats = engine.stats()
        return found, stats.accepted, stats.drafted

    monkeypatch.setattr(GraphRunner, "round", counted)
    plain, _, _ = answers()
    assert seen and all(kept_B is not None for kept_B in seen)
    seen.clear()
    whole, accepted, drafted = answers(speculate=4)
    assert all(kept_B is not None for kept_B in seen) and max(kept_B.max() for kept_B in seen) == 5
    monkeypatch.setattr(GraphRunner, "round", lambda *arguments: None)
    monkeypatch.setattr(GraphRunner, "drafts", lambda *arguments: None)
    single, accepted_single, drafted_single = answers(speculate=4)
    # bf16 rounds otherwise in another batch shape, so a draw on a border may turn, and a text with it.
    assert sum(whole[name] == plain[name] for name in plain) >= len(plain) - 2
    assert sum(single[name] == plain[name] for name in plain) >= len(plain) - 2
    assert accepted > 0.85 * drafted and abs(accepted / drafted - accepted_single / drafted_single) < 0.05


def test_graphs_compute_what_the_plain_runner_computes():
    import numpy as np

    from teacher.cache import LatentCache
    from teacher.graphs import GraphRunner
    from teacher.runner import Batch, TorchRunner

    model = fresh(torch.bfloat16, "cuda")
    table_SP = np.arange(1, 61, dtype=np.int32).reshape(6, 10)
    found = []
    for kind in (TorchRunner, GraphRunner):
        cache = LatentCache(model.config, model.config.num_hidden_layers + 1, 60, 8, torch.bfloat16, "cuda")
        runner, rng, outputs = kind(model, cache), np.random.default_rng(0), []
        at_S = np.zeros(6, dtype=np.int64)
        for rows in ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [5], [0, 2], [0, 1, 2, 3, 4]) * 8:
            rows_B, count_B = np.array(rows), rng.integers(1, 3, len(rows))
            position_N = np.concatenate([np.arange(at_S[r], at_S[r] + n) for r, n in zip(rows, count_B, strict=True)])
            at_S[rows_B] += count_B
            batch = Batch(rng.integers(0, 250, len(position_N)).astype(np.int32), position_N, rows_B, count_B, table_SP)
            logits_MV, hidden_NH = runner.forward(batch, np.arange(len(position_N)))
            drafted_MV, _ = runner.draft(hidden_NH, batch, np.zeros(len(rows), dtype=np.int64), batch.last_B)
            outputs += [logits_MV.float(), drafted_MV.float()]
        found.append(outputs)
    for plain, graph in zip(*found, strict=True):
        assert (plain - graph).abs().mean() < 0.02 * plain.abs().mean()


def test_short_prompts_by_graphs_and_fused_kernels_are_the_models():
    import numpy as np

    from teacher.cache import LatentCache
    from teacher.graphs import GraphRunner
    from teacher.runner import Batch, TorchRunner
    from tests.teacher.kernels.test_fused import model_of

    model = model_of("cuda", "model")
    table_SP = np.arange(1, 41, dtype=np.int32).reshape(4, 10)
    found = []
    for kind, kernels in ((TorchRunner, False), (GraphRunner, True)):
        cache = LatentCache(model.config, model.config.num_hidden_layers + 1, 40, 8, torch.bfloat16, "cuda")
        runner, rng, outputs = kind(model, cache, kernels), np.random.default_rng(0), []
        at_S = np.zeros(4, dtype=np.int64)
        for rows, counts in (([0, 1], [20, 7]), ([2], [30]), ([3], [50]), ([1], [9]), ([0, 1, 2], [1, 1, 4])):
            rows_B, count_B = np.array(rows), np.array(counts)
            position_N = np.concatenate([np.arange(at_S[r], at_S[r] + n) for r, n in zip(rows, counts, strict=True)])
            at_S[rows_B] += count_B
            batch = Batch(rng.integers(0, 250, len(position_N)).astype(np.int32), position_N, rows_B, count_B, table_SP)
            logits_MV, hidden_NH = runner.forward(batch, batch.last_B)
            _, out_NH = runner.draft(hidden_NH, batch, np.zeros(len(rows), dtype=np.int64), batch.last_B[:0])
            outputs += [logits_MV.float().clone(), hidden_NH.float().clone(), out_NH.float().clone()]
        found.append(outputs)
    assert len(runner._graphs) == 10  # none of them was run operator by operator
    for plain, graph in zip(*found, strict=True):
        assert (plain - graph).norm() < 0.06 * plain.norm()

"""The engine's torch runner with the MLA kernel inside, and with an FP8 cache."""

from importlib import resources

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

pytest.importorskip("triton", reason="Triton is not installed")

from teacher import load_model
from teacher.cache import LatentCache
from teacher.engine import Engine
from teacher.requests import Request
from teacher.runner import Batch, TorchRunner
from tests.teacher.random_configs import randomize
from tests.tiny import deepseek_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fresh(dtype=torch.bfloat16, device=DEVICE, **fields):
    torch.manual_seed(0)
    model = load_model(deepseek_config(**fields))
    randomize(model, 0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device)


def outputs(model, kernels, cache_dtype, page_size):
    """Logits of the main model and of its draft over steps of one to three tokens of four sequences."""
    cache = LatentCache(model.config, model.config.num_hidden_layers + 1, 40, page_size, cache_dtype, DEVICE)
    runner, rng, found = TorchRunner(model, cache, kernels), np.random.default_rng(0), []
    table_SP = np.arange(1, 41, dtype=np.int32).reshape(4, 10)
    at_S = np.zeros(4, dtype=np.int64)
    for rows in ([0, 1, 2, 3], [1, 2], [0, 3], [0, 1, 2, 3]) * (3 if DEVICE == "cuda" else 1):
        rows_B, count_B = np.array(rows), rng.integers(1, 4, len(rows))
        position_N = np.concatenate([np.arange(at_S[r], at_S[r] + n) for r, n in zip(rows, count_B, strict=True)])
        first_B = np.minimum(at_S[rows_B], 2)
        at_S[rows_B] += count_B
        batch = Batch(rng.integers(0, 250, len(position_N)).astype(np.int32), position_N, rows_B, count_B, table_SP)
        logits_MV, hidden_NH = runner.forward(batch, np.arange(len(position_N)))
        drafted_MV, _ = runner.draft(hidden_NH, batch, first_B, batch.last_B)
        found += [logits_MV.float(), drafted_MV.float()]
    return found


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.uint8])
def test_kernel_and_torch_give_the_same_logits(cache_dtype, page_size):
    # bf16's rounding now and then flips a router's choice: none here. Interpreted, two layers and the draft's.
    model = fresh(first_k_dense_replace=100, num_hidden_layers=3 if DEVICE == "cuda" else 2)
    by_kernel, by_torch = (outputs(model, kernels, cache_dtype, page_size) for kernels in (True, False))
    for found, expected in zip(by_kernel, by_torch, strict=True):
        assert (found - expected).norm() < 0.06 * expected.norm()


@pytest.mark.parametrize("settings", [{}, {"speculate": 2}, {"cache_tokens": 160}])
def test_an_fp8_cache_leaves_a_trained_models_answers(settings):
    folder = resources.files("teacher") / "models/tiny-r1"
    model, tokenizer = load_model(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)
    prompts = [f"What is {a} * {b}?" for a, b in ((12, 34), (78, 21), (9, 55))]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    wanted = [
        Request(text, tokenizer(text, add_special_tokens=False)["input_ids"], temperature=0.0, max_tokens=60)
        for text in texts
    ]  # fmt: skip

    def tokens(**more):
        engine = Engine(model, tokenizer, 4, 200, native=False, **settings, **more)
        return engine, {done.id: done.token_ids for done in engine.generate(wanted)}

    exact, expected = tokens()
    engine, found = tokens(cache_dtype="fp8")
    layers = model.config.num_hidden_layers + ("speculate" in settings)
    assert engine.cache_bytes_per_token == layers * (32 + 4 + 2 * 16)
    assert exact.cache_bytes_per_token == layers * 4 * (32 + 16)
    assert engine.runs_in == "torch"
    same = sum(a == b for name in expected for a, b in zip(found[name], expected[name], strict=False))
    assert same > 0.8 * sum(map(len, expected.values()))


def test_cache_dtypes_are_named():
    with pytest.raises(ValueError, match="cache_dtype is 'int4'; expected 'model' or 'fp8'"):
        Engine(fresh(torch.float32, "cpu"), [], cache_dtype="int4")

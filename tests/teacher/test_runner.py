"""A step over cached sequences against the whole sequence run at once."""

import random

import numpy as np
import pytest
import torch

from teacher import load_model
from teacher.attention import FreshView
from teacher.cache import LatentCache
from teacher.native.build import build, sgemm
from teacher.native.pack import Packed, sizes
from teacher.native.runner import NativeRunner, native_runners
from teacher.runner import Batch, TorchRunner, absorbed_is_cheaper
from teacher.slots import Slots
from tests.teacher.random_configs import random_config, randomize
from tests.tiny import deepseek_config


def fresh(seed, **changes):
    torch.manual_seed(seed)
    model = load_model(random_config(seed) if not changes else deepseek_config(**changes))
    randomize(model, seed)
    return model


def grown(runner, sequences, page_size, rng):
    """Feed the sequences in pieces of random length, several a call; yields (row, position, logits, hidden)."""
    slots = rng.sample(range(7), len(sequences))
    pages = iter(rng.sample(range(1, 60), 59))
    table_SP = np.zeros((7, 20), dtype=np.int32)
    for slot in slots:
        table_SP[slot] = 0
        for number in range(-(-len(sequences[0]) // page_size)):
            table_SP[slot, number] = next(pages)
    done = [0] * len(sequences)
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        rows = [row for row in range(len(sequences)) if done[row] < len(sequences[row]) and rng.random() < 0.8]
        if not rows:
            continue
        counts = [min(rng.choice([1, 1, 2, 7]), len(sequences[row]) - done[row]) for row in rows]
        at = [(row, done[row] + n) for row, count in zip(rows, counts, strict=True) for n in range(count)]
        batch = Batch(
            np.array([sequences[row][position] for row, position in at], dtype=np.int32),
            np.array([position for _, position in at]),
            np.array([slots[row] for row in rows]),
            np.array(counts),
            table_SP,
        )
        wanted = np.array(sorted(rng.sample(range(len(at)), rng.randint(1, len(at)))))
        logits, hidden = runner.forward(batch, wanted)
        for index, (row, position) in enumerate(at):
            found = np.nonzero(wanted == index)[0]
            yield row, position, logits[found[0]] if len(found) else None, hidden[index]
        for row, count in zip(rows, counts, strict=True):
            done[row] += count


def runner_in(language, model, cache):
    if language == "torch":
        return TorchRunner(model, cache)
    return native_runner(model, cache)


def native_runner(model, cache):
    """The C step whatever the sizes, where this machine can build it."""
    library = build(sizes(model.config, cache.page_size))
    if library is None or sgemm() is None:
        pytest.skip("no C compiler, or a torch whose BLAS cannot be called")
    return NativeRunner(model, cache, Packed(model), library)


@pytest.mark.parametrize("language", ["torch", "c"])
@pytest.mark.parametrize("seed", range(8))
def test_steps_of_any_size_equal_the_whole_at_once(seed, language):
    model = fresh(seed)
    config, rng = model.config, random.Random(seed)
    sequences_BT = torch.randint(0, config.vocab_size, (4, 30))
    with torch.inference_mode():
        whole = model(sequences_BT)
    page_size = rng.choice([1, 4, 16])
    if page_size == 1:
        sequences_BT = sequences_BT[:, :12]
    cache = LatentCache(config, config.num_hidden_layers, 60, page_size, torch.float32, "cpu")
    if language == "c":
        cache.latents_LPGC.fill_(float("nan"))  # what is not written must not be read
    scale = whole.logits.abs().max()
    runner = runner_in(language, model, cache)
    for row, position, logits_V, hidden_H in grown(runner, sequences_BT.tolist(), page_size, rng):
        torch.testing.assert_close(hidden_H, whole.hidden[row, position], rtol=1e-4, atol=1e-4)
        assert logits_V is None or (logits_V - whole.logits[row, position]).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("language", ["torch", "c"])
def test_draft_module_over_its_cache_equals_training_forward(language):
    model = fresh(1, num_nextn_predict_layers=1)
    ids_BT = torch.randint(0, 263, (1, 21))
    with torch.inference_mode():
        whole = model(ids_BT, mtp=True)
    cache = LatentCache(model.config, model.config.num_hidden_layers + 1, 8, 4, torch.float32, "cpu")
    runner = runner_in(language, model, cache)
    table_SP = np.array([[5, 2, 7, 1, 3, 8]], dtype=np.int32)
    for first, end in ((0, 7), (7, 8), (8, 20)):
        batch = Batch(
            ids_BT[0, first + 1 : end + 1].numpy().astype(np.int32), np.arange(first, end), np.array([0]),
            np.array([end - first]), table_SP,
        )  # fmt: skip
        logits_MV, _ = runner.draft(whole.hidden[0, first:end], batch, np.array([0]), np.arange(end - first))
        torch.testing.assert_close(logits_MV, whole.mtp_logits[0][0, first:end], rtol=1e-4, atol=1e-4)


def test_absorbed_form_for_decoding_and_expanded_for_prefill():
    from teacher.config import DeepseekV3Config

    big = DeepseekV3Config()
    assert absorbed_is_cheaper(big, new=1, context=4096)
    assert absorbed_is_cheaper(big, new=4, context=4096)
    assert not absorbed_is_cheaper(big, new=2048, context=4096)


def test_the_draft_module_looks_no_further_back_than_told():
    model = fresh(2, num_nextn_predict_layers=1)
    hidden_NH, tokens_N = torch.randn(6, 32), np.arange(6, dtype=np.int32)
    found = []
    for language in ("torch", "c"):
        for poison in (0.0, 3.0):
            cache = LatentCache(model.config, model.config.num_hidden_layers + 1, 8, 4, torch.float32, "cpu")
            cache.latents_LPGC[-1, 1] = poison  # positions 0 to 3, which nobody may see
            runner = runner_in(language, model, cache)
            batch = Batch(
                tokens_N, np.arange(4, 10), np.array([0]), np.array([6]), np.array([[1, 2, 3]], dtype=np.int32)
            )
            found.append(runner.draft(hidden_NH, batch, np.array([4]), np.arange(6))[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_draws_in_c_are_those_of_torch():
    model = fresh(0)
    cache = LatentCache(model.config, model.config.num_hidden_layers, 4, 4, torch.float32, "cpu")
    runner = native_runner(model, cache)
    rng, rows = np.random.default_rng(0), 3000
    slots = Slots(rows, 8, 4, 0)
    slots.temperature_S[:] = rng.choice([0.0, 0.3, 0.6, 1.0, 2.0], rows)
    slots.top_p_S[:] = rng.choice([0.1, 0.8, 0.95, 1.0], rows)
    slots.top_k_S[:] = rng.choice([0, 0, 1, 5, 40, 1000], rows)
    slots.min_p_S[:] = rng.choice([0.0, 0.0, 0.001, 0.1, 1.0], rows)
    slots.seed_S[:] = rng.integers(-(2**63), 2**63, rows)
    slot_M, counter_M = rng.permutation(rows), rng.integers(0, 2**40, rows)
    vocabulary = model.config.vocab_size
    logits_MV = torch.from_numpy(rng.normal(size=(rows, vocabulary)).astype(np.float32)) * torch.rand(rows, 1) * 8
    logits_MV[::7, vocabulary // 2 :] = float("-inf")
    expected = TorchRunner(model, cache).draw(logits_MV, slots, slot_M, counter_M)
    found = runner.draw(logits_MV, slots, slot_M, counter_M)
    assert (found != expected).sum() <= 1  # float32 sums in another order may move one draw in a million
    assert len(set(expected.tolist())) > vocabulary // 2


def test_a_row_that_is_no_number_still_draws_a_token():
    model = fresh(0)
    runner = native_runner(model, LatentCache(model.config, model.config.num_hidden_layers, 4, 4, torch.float32, "cpu"))
    logits_MV = torch.randn(4, model.config.vocab_size)
    logits_MV[0] = logits_MV[1, 3] = float("nan")
    logits_MV[2, 5] = float("inf")
    logits_MV[3] = float("-inf")
    slots = Slots(4, 8, 4, 0)
    slots.temperature_S[:], slots.top_p_S[:], slots.top_k_S[:] = 1.0, 0.99, 100
    drawn_M = runner.draw(logits_MV, slots, np.arange(4), np.arange(4))
    assert (drawn_M >= 0).all() and (drawn_M < model.config.vocab_size).all() and drawn_M[2] == 5


def test_large_or_half_precision_models_run_in_torch():
    half = load_model(deepseek_config(), dtype="bfloat16")
    cache = LatentCache(half.config, half.config.num_hidden_layers, 4, 4, torch.bfloat16, "cpu")
    assert native_runners(half, cache, 1) is None


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.uint8])
@torch.inference_mode()
def test_prompts_without_a_past_attend_as_over_the_cache(cache_dtype):
    """FreshView, which a GPU's prefill takes, against CacheView: the same outputs and the same cache."""
    torch.manual_seed(0)
    model = load_model(deepseek_config())
    attention = model.main_layers[0].self_attn
    x_BTH, position_BT = torch.randn(2, 7, 32), torch.arange(7).repeat(2, 1)
    position_BT[1, 5:] = -1
    table_BP = torch.arange(1, 5, dtype=torch.int32).view(2, 2)
    turn, found = (model.cos_TD[position_BT.clamp_min(0)], model.sin_TD[position_BT.clamp_min(0)]), []
    for fresh in (False, True):
        cache = LatentCache(model.config, 3, 4, 4, cache_dtype, "cpu")
        (view, *_), absorbed = TorchRunner(model, cache)._views(slice(3), position_BT, table_BP, None)
        assert not absorbed
        if fresh:
            view = FreshView(view.cache_PW, view.write_BT)
        found.append((attention.extend(x_BTH, *turn, view, False)[position_BT >= 0], cache.latents_LPGC[:, 1:].clone()))
    assert torch.equal(found[0][1], found[1][1]) and found[0][1].any()
    assert (found[0][0] - found[1][0]).abs().max() < 1e-5 * found[0][0].abs().max()

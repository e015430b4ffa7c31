"""The slot decoder against transformers' generate, and its independence of the batch."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from evals.decode import Decoder, Request

FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}


def small_model(family="qwen2", seed=0, **changes):
    model, config = FAMILIES[family]
    fields = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "head_dim": 8,
    } | changes  # fmt: skip
    torch.manual_seed(seed)
    return model(config(**fields)).eval()


def requests(count, *, temperature=0.6, max_tokens=24, stop_ids=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(1, 20, (1,), generator=generator))
        prompt = torch.randint(0, 96, (length,), generator=generator).tolist()
        made.append(Request(f"r{index}", prompt, temperature, 0.95, max_tokens, 1000 + index, stop_ids))
    return made


def decode(model, asked, batch_size):
    done = list(Decoder(model, batch_size).generate(asked))
    assert sorted(c.id for c in done) == sorted(r.id for r in asked)
    return {c.id: c for c in done}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate(family):
    model, asked = small_model(family), requests(9, temperature=0.0, stop_ids=(5, 6))
    expected = {}
    for request in asked:
        prompt = torch.tensor([request.prompt_ids])
        # The mask is given because generate() would take a 0 in the prompt for padding.
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24, eos_token_id=[5, 6],
            pad_token_id=0,
        )  # fmt: skip
        new = ids[0, len(request.prompt_ids) :].tolist()
        expected[request.id] = (new[:-1], "stop") if new[-1] in (5, 6) else (new, "length")
    done = decode(model, asked, batch_size=4)
    assert {i: (c.token_ids, c.finish_reason) for i, c in done.items()} == expected
    assert {"stop", "length"} == {c.finish_reason for c in done.values()}


def test_a_sample_depends_on_its_request_alone():
    model = small_model()
    asked = requests(20, stop_ids=tuple(range(8)))
    together = decode(model, asked, batch_size=20)
    for batch_size, some in ((1, asked[::3]), (3, asked[::-1]), (7, asked[5:])):
        for i, completion in decode(model, some, batch_size).items():
            assert completion.token_ids == together[i].token_ids
            assert completion.finish_reason == together[i].finish_reason
    assert len({len(c.token_ids) for c in together.values()}) > 3  # slots were given free at different times


def test_seeds_give_different_samples():
    model = small_model()
    asked = [Request(str(n), [1, 2, 3], 1.0, 1.0, 12, n, ()) for n in range(8)]
    assert len({tuple(c.token_ids) for c in decode(model, asked, 8).values()}) == 8


def test_sampled_tokens_follow_the_models_distribution():
    model = small_model()
    asked = [Request(str(n), [4, 7, 9], 0.6, 0.95, 1, n, ()) for n in range(4000)]
    drawn = torch.tensor([c.token_ids[0] for c in decode(model, asked, 1000).values()])
    with torch.no_grad():
        logits = model(torch.tensor([[4, 7, 9]])).logits[0, -1] / 0.6
    ordered, order = logits.softmax(-1).sort(descending=True)
    ordered[ordered.cumsum(0) - ordered >= 0.95] = 0
    expected = torch.zeros(96).scatter(0, order, ordered / ordered.sum())
    observed = torch.bincount(drawn, minlength=96) / 4000
    assert (observed - expected).abs().max() < 4 * (expected * (1 - expected) / 4000).sqrt().max()


def test_what_a_freed_slot_held_is_never_read():
    model, asked = small_model(), requests(12, stop_ids=tuple(range(8)))
    clean = decode(model, asked, batch_size=3)
    from evals import decode as module

    class Poisoned(module.SlotCache):
        def __init__(self, *args):
            super().__init__(*args)
            self.data.fill_(1e4)  # finite, so that weight 0 hides it; anything read would change every logit

    original, module.SlotCache = module.SlotCache, Poisoned
    try:
        poisoned = decode(model, asked, batch_size=3)
    finally:
        module.SlotCache = original
    assert {i: c.token_ids for i, c in poisoned.items()} == {i: c.token_ids for i, c in clean.items()}


def test_other_attention_is_refused():
    model = small_model()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="sliding_attention"):
        Decoder(model)


def test_nothing_asked_nothing_made():
    assert list(Decoder(small_model()).generate([])) == []

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from students.attention import use_training_attention
from students.data import Example, build_examples
from students.loop import summed_loss
from students.packing import best_fit_decreasing, collate, layout, plan_steps
from tests.students.rows import rows

lengths_ = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(lengths_)
def test_bins_hold_every_example_once_and_never_overflow(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, 100)
    assert sorted(index for row in bins for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 100 for row in bins)
    # No two bins could have been one: best fit opens a bin only if nothing has room.
    loads = sorted(sum(lengths[i] for i in row) for row in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > 100


def test_best_fit_takes_the_fullest_bin_with_room() -> None:
    assert best_fit_decreasing([60, 50, 40, 50], 100) == [[0, 2], [1, 3]]


@settings(max_examples=60, deadline=None)
@given(lengths_, st.integers(100, 400), st.booleans())
def test_layout_holds_every_example_once_within_the_limit(lengths: list[int], limit: int, packing: bool) -> None:
    batches = layout(lengths, limit, packing)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[index] for index in batch]
        assert (sum(sizes) if packing else max(sizes) * len(sizes)) <= limit


@settings(max_examples=40, deadline=None)
@given(lengths_, st.integers(1, 500), st.integers(1, 4))
def test_epochs_see_every_example_equally_often_in_even_steps(lengths: list[int], per_step: int, epochs: int) -> None:
    steps = plan_steps(lengths, per_step, epochs, seed=3)
    counts = Counter(index for step in steps for index in step)
    assert set(counts.values()) == {epochs} and len(counts) == len(lengths)
    target = sum(lengths) * epochs / max(1, round(sum(lengths) * epochs / per_step))
    for step in steps:
        assert sum(lengths[index] for index in step) < target + 100


def test_plan_is_a_function_of_the_seed_and_shuffles_every_epoch() -> None:
    lengths = list(range(20, 60))
    first = plan_steps(lengths, 200, 2, seed=1)
    assert first == plan_steps(lengths, 200, 2, seed=1) != plan_steps(lengths, 200, 2, seed=2)
    order = [index for step in first for index in step]
    assert order[:40] != order[40:] and sorted(order[:40]) == sorted(order[40:])


def test_half_an_epoch_is_half_the_examples() -> None:
    assert sum(len(step) for step in plan_steps([10] * 40, 50, 0.5, seed=0)) == 20


@settings(max_examples=60, deadline=None)
@given(lengths_, st.integers(1, 3000))
def test_token_budget_is_met_to_half_an_example(lengths: list[int], budget: int) -> None:
    steps = plan_steps(lengths, 200, epochs=1, seed=0, max_tokens=budget)
    seen = sum(lengths[index] for step in steps for index in step)
    assert abs(seen - budget) <= max(lengths) / 2 or (len(steps) == 1 and len(steps[0]) == 1)


def _model(folder: Path, ours: bool) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if ours:
        use_training_attention(model)
    return model


def _loss_and_gradients(
    model: torch.nn.Module, batches: list, dtype: str = "float32"
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = sum(summed_loss(model, batch, dtype) for batch in batches)
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def _plain(model: torch.nn.Module, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """One example at a time through transformers' own eager attention and loss: the reference."""
    model.zero_grad()
    total = torch.zeros(())
    for example in examples:
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        labels[0, : example.prompt_length] = -100
        total = total + model(input_ids=ids, labels=labels).loss * example.loss_tokens
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("base", ["qwen", "llama"])
def test_packed_and_padded_have_the_loss_and_gradients_of_single_examples(
    base: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    examples = build_examples(rows(9), AutoTokenizer.from_pretrained(folder), 200).examples
    loss, gradients = _plain(_model(folder, ours=False), examples)
    ours = _model(folder, ours=True)
    for batches in (
        [collate(examples, packing=True)],
        [collate(examples[:4], packing=True), collate(examples[4:], packing=True)],
        [collate(examples, packing=False)],
        [collate(examples[:2], packing=False), collate(examples[2:], packing=False)],
    ):
        found, found_gradients = _loss_and_gradients(ours, batches)
        assert found == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            scale = gradient.abs().max()
            assert scale > 0, name
            torch.testing.assert_close(found_gradients[name] / scale, gradient / scale, atol=2e-5, rtol=0)


def test_packed_example_does_not_see_its_neighbours(qwen: Path) -> None:
    model = _model(qwen, ours=True)
    examples = build_examples(rows(4), AutoTokenizer.from_pretrained(qwen), 200).examples
    poisoned = [Example([5] * len(example.input_ids), 1) for example in examples]
    clean = collate(examples, packing=True)
    mixed = collate([*poisoned[:2], examples[2], poisoned[3]], packing=True)
    start = sum(len(example.input_ids) for example in examples[:2])
    here = slice(start, start + len(examples[2].input_ids))
    with torch.no_grad():
        everything = [{**batch.inputs, "logits_to_keep": 0} for batch in (clean, mixed)]
        one, other = (model(**inputs, use_cache=False).logits[0, here] for inputs in everything)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_bfloat16_attention_on_the_cpu_agrees_with_float32(qwen: Path) -> None:
    examples = build_examples(rows(9), AutoTokenizer.from_pretrained(qwen), 200).examples
    model = _model(qwen, ours=True)
    loss, gradients = _loss_and_gradients(model, [collate(examples, packing=True)])
    for packing in (True, False):
        found, found_gradients = _loss_and_gradients(model, [collate(examples, packing)], "bfloat16")
        assert found == pytest.approx(loss, rel=2e-3) and found != loss
        for name, gradient in gradients.items():
            error = (found_gradients[name] - gradient).norm() / gradient.norm()
            assert error < 0.05, (name, float(error))  # 2^-8 a rounding, through two layers and back


def test_sliding_windows_and_dropout_are_refused(qwen: Path) -> None:
    model = _model(qwen, ours=False)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="sliding-window"):
        use_training_attention(model)
    model = _model(qwen, ours=False)
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        use_training_attention(model)

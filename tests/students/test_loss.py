"""The cross-entropy that never holds all logits is the plain one: loss, gradients, and where it is taken at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from students import loss
from students.attention import use_training_attention
from students.data import build_examples
from students.loop import summed_loss
from students.lora import Lora, add_adapters
from students.loss import large_head, summed_cross_entropy
from students.packing import IGNORED, Batch, collate
from tests.students.rows import rows


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is too large, and a chunk is 7 positions of the tiny models' vocabulary."""
    monkeypatch.setattr(loss, "PLAIN_LOGITS", 0)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 7 * 300)


def batches(folder: Path) -> list[Batch]:
    examples = build_examples(rows(9), AutoTokenizer.from_pretrained(folder), 200).examples
    return [collate(examples[:6], packing=True), collate(examples[6:], packing=False)]


def gradients(model: nn.Module, folder: Path, dtype: str = "float32") -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = sum(summed_loss(model, batch, dtype) for batch in batches(folder))
    (total / 3).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()), found


def opened(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    use_training_attention(model)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("base", "tied"), [("qwen", True), ("llama", False)])
def test_loss_and_gradients_are_those_of_the_plain_way(
    base: str, tied: bool, dtype: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    model = opened(folder)
    assert model.config.tie_word_embeddings is tied
    plain, expected = gradients(model, folder, dtype)
    request.getfixturevalue("chunked")
    total, found = gradients(model, folder, dtype)
    bound = 1e-5 if dtype == "float32" else 1e-2  # bfloat16: a rounding of each logit's gradient at another scale
    assert total == pytest.approx(plain, rel=1e-6 if dtype == "float32" else 1e-4)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < bound * gradient.norm(), name
    logits = model(input_ids=torch.tensor([[1, 2]])).logits
    assert logits.shape[-1] == model.config.vocab_size  # the head is back


def test_adapters_get_their_gradients_and_the_frozen_head_none(qwen: Path, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    model = add_adapters(opened(qwen), Lora(r=4, dropout=0.1))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    torch.manual_seed(1)
    plain, expected = gradients(model, qwen)
    request.getfixturevalue("chunked")
    torch.manual_seed(1)  # looking at the head must not shift the dropout
    total, found = gradients(model, qwen)
    assert total == pytest.approx(plain, rel=1e-6)
    assert set(found) == set(expected) and all("lora" in name for name in found)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_parallel_replicas_get_the_gradients_too(qwen: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """DistributedDataParallel counts every parameter's gradient once: the head's comes from outside its forward."""
    expected = gradients(opened(qwen), qwen)[1]
    request.getfixturevalue("chunked")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(opened(qwen))
        one, two = batches(qwen)
        for _ in range(2):  # a second step fails if the first left a gradient waiting
            model.zero_grad()
            with model.no_sync():
                (summed_loss(model, one, "float32") / 3).backward()
            (summed_loss(model, two, "float32") / 3).backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in expected.items():
        found = model.module.get_parameter(name).grad
        assert found is not None and (found - gradient).norm() < 1e-5 * gradient.norm(), name


def test_without_gradients_the_loss_is_the_same(qwen: Path, chunked: None) -> None:
    model = opened(qwen)
    batch = batches(qwen)[0]
    with torch.no_grad():
        evaluated = summed_loss(model, batch, "float32")
    trained = summed_loss(model, batch, "float32")
    assert not evaluated.requires_grad and trained.requires_grad and float(evaluated) == float(trained.detach())


def test_ignored_targets_count_nothing(chunked: None) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    targets = torch.randint(300, (20,))
    targets[::3] = IGNORED
    summed_cross_entropy(hidden, weight, targets).backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum").backward()
    for ours, theirs in zip(grads, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (hidden.grad[::3] == 0).all() and (hidden.grad[1] != 0).all()


def test_head_is_left_alone_where_it_is_not_a_plain_product(
    qwen: Path, chunked: None, caplog: pytest.LogCaptureFixture
) -> None:
    class Capped(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config
            self.get_output_embeddings = inner.get_output_embeddings

        def forward(self, **inputs: Any) -> Any:
            output = self.inner(**inputs)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

    assert large_head(opened(qwen), 10) is not None
    assert large_head(Capped(opened(qwen)), 10) is None
    biased = opened(qwen)
    biased.lm_head = nn.Linear(biased.config.hidden_size, biased.config.vocab_size)
    assert large_head(biased, 10) is None
    adapted = add_adapters(opened(qwen), Lora(r=2, target_modules=("lm_head", "q_proj")))
    assert large_head(adapted, 10) is None and large_head(adapted, 10) is None
    reasons = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert reasons == [
        "the model does more to its logits than to multiply", "the head has a bias", "the head is a Linear",
    ]  # fmt: skip


def test_small_logits_are_simply_made(qwen: Path) -> None:
    assert large_head(opened(qwen), 1000) is None
    assert large_head(opened(qwen), loss.PLAIN_LOGITS // 100) is not None

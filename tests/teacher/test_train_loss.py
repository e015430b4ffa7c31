"""The head's loss against torch's own cross entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from teacher import loss, shapes
from teacher.batches import IGNORE


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("chunk", [1 << 24, 50 * 7])
def test_head_loss_is_cross_entropy_with_its_gradients(
    chunk: int, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "fixed", lambda x: fixed)  # True: as on a GPU
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)  # 7 positions at a time in the second case
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False)
    hidden = torch.randn(3, 11, 16, requires_grad=True)
    targets = torch.randint(50, (3, 11))
    targets[torch.rand(3, 11) < 0.4] = IGNORE

    total, best = loss.head_loss(hidden, head, targets)
    (total / 5).backward()
    ours = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    logits = head(hidden)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    (expected / 5).backward()

    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(ours, (hidden.grad, head.weight.grad))
    assert torch.equal(best, torch.where(targets == IGNORE, IGNORE, logits.argmax(-1)))


def test_under_autocast_the_products_are_bf16_and_the_sum_is_not() -> None:
    torch.manual_seed(0)
    head = nn.Linear(32, 50, bias=False)
    hidden = torch.randn(2, 40, 32, requires_grad=True)
    targets = torch.randint(50, (2, 40))
    exact, _ = loss.head_loss(hidden, head, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = loss.head_loss(hidden, head, targets)
    assert total.dtype == torch.float32 and total != exact
    torch.testing.assert_close(total, exact, rtol=5e-3, atol=0)
    total.backward()
    assert hidden.grad is not None and head.weight.grad is not None and head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("fixed", [False, True])
def test_no_position_with_a_loss_is_no_loss(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "fixed", lambda x: fixed)
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    total, best = loss.head_loss(hidden, nn.Linear(8, 5, bias=False), torch.full((1, 4), IGNORE))
    total.backward()
    assert total == 0 and (best == IGNORE).all() and hidden.grad is not None and not hidden.grad.any()

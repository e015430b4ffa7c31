"""The loss's Triton kernel against float64: interpreted where there is no GPU (tests.conftest), else compiled."""

import pytest
import torch

from students.loss_kernel import to_gradient
from students.packing import IGNORED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [300, 8192, 20_001])
def test_losses_and_gradients_are_those_of_float64(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    logits = (torch.randn(9, vocabulary, device=DEVICE) * 4).to(dtype)
    logits[1, 17] = 60.0  # nearly certain
    logits[2, : vocabulary // 2] = float("-inf")
    targets = torch.randint(vocabulary // 2, vocabulary, (9,), device=DEVICE)
    targets[1], targets[4], targets[8] = 17, IGNORED, vocabulary - 1
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, ignore_index=IGNORED, reduction="none")
    losses.sum().backward()
    found = torch.full((9,), float("nan"), device=DEVICE)
    to_gradient(logits, targets, found)
    torch.testing.assert_close(found.double(), losses.detach(), atol=2e-5, rtol=2e-6)
    rounding = 2**-8 if DEVICE == "cuda" else 2**-7  # Triton's interpreter cuts off instead
    bound = 2e-6 if dtype == torch.float32 else rounding
    torch.testing.assert_close(logits.double(), exact.grad, atol=2e-6, rtol=bound)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_loss(bad: float) -> None:
    logits = torch.randn(2, 500, device=DEVICE)
    logits[1, 77] = bad
    losses = torch.zeros(2, device=DEVICE)
    to_gradient(logits, torch.tensor([3, 4], device=DEVICE), losses)
    assert losses[0].isfinite() and not losses[1].isfinite()

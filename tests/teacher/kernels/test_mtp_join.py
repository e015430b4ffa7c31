"""The draft module's input by the kernel is `MTPLayer.join`'s before its projection."""

import pytest
import torch

pytest.importorskip("triton")

from teacher.kernels.mtp_join import mtp_join, mtp_join_reference
from teacher.norm import RMSNorm


def norm(size, device):
    made = RMSNorm(size, 1e-6).to(device, torch.bfloat16)
    made.weight.data.normal_(1.0, 0.2)
    return made.requires_grad_(False)


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 128), (5, 64), (3, 200), (40, 2048), (2, 7168)])
@torch.no_grad()
def test_embedding_and_hidden_state_side_by_side(tokens, hidden, device):
    torch.manual_seed(hidden)
    embedding_VH = torch.randn(50, hidden, device=device).bfloat16()
    hidden_NH = torch.randn(tokens, hidden, device=device).mul_(3).bfloat16()
    tokens_N = torch.randint(0, 50, (tokens,), device=device)
    norms = norm(hidden, device), norm(hidden, device)
    expected = mtp_join_reference(tokens_N, embedding_VH, hidden_NH, *norms).float()
    found = mtp_join(tokens_N, embedding_VH, hidden_NH, *norms).float()
    assert expected.abs().mean() > 0.5 and (found - expected).abs().max() <= 2**-7 * expected.abs().max()
    assert (found != expected).float().mean() < 0.01  # a last bit here and there: sums in another order


def test_what_it_cannot_take_is_said(device):
    rows = torch.zeros(3, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="2 tokens with embeddings of 64, hidden states 3 x 64"):
        mtp_join(torch.zeros(2, dtype=torch.int64, device=device), rows, rows, norm(64, device), norm(64, device))

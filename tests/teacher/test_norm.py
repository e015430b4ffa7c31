"""RMSNorm's hand-written backward against autograd's."""

import pytest
import torch
import torch.nn.functional as F

from teacher.norm import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 16), (2, 3, 4, 33)])
def test_forward_and_backward_equal_torchs(dtype, shape):
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(shape) + 0.5).to(dtype).requires_grad_()
    weight = norm.weight.detach().clone().requires_grad_()
    x32 = x.detach().float().requires_grad_()
    expected = F.rms_norm(x32, shape[-1:], weight, 1e-5)
    found = norm(x)
    direction = torch.randn(shape).to(dtype)
    found.backward(direction)
    expected.backward(direction.float())
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, **tolerance)
    torch.testing.assert_close(x.grad.float(), x32.grad, **tolerance)
    torch.testing.assert_close(norm.weight.grad, weight.grad, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(norm(x).float(), expected, **tolerance)

"""The operators that the vLLM plug-in brings, without vLLM."""

import torch
import torch.nn.functional as F

from teacher.fp8 import dequantize, quantize
from teacher.vllm_plugin.ops import fp8_experts, fp8_linear


def fake(x, block):
    return dequantize(*quantize(x, block), torch.float32, block)


def test_linear_is_the_dequantised_product():
    torch.manual_seed(0)
    x, w = torch.randn(7, 256), torch.randn(192, 256)
    values, scale = quantize(w)
    found = fp8_linear(x, values, scale)
    torch.testing.assert_close(found, fake(x, (1, 128)) @ fake(w, (128, 128)).T, rtol=1e-4, atol=1e-3)
    torch.library.opcheck(fp8_linear, (x.bfloat16(), values, scale), test_utils="test_faketensor")


def test_experts_are_their_dequantised_products_summed_by_weight():
    torch.manual_seed(0)
    x, ids = torch.randn(9, 256), torch.randint(0, 2, (9, 2), dtype=torch.int32) * torch.tensor([2, 3]).int()
    weights = torch.rand(9, 2)
    matrices = torch.randn(4, 256, 256) / 16, torch.randn(4, 256, 128) / 11
    packed = [torch.stack(part) for m in matrices for part in zip(*(quantize(one) for one in m), strict=True)]
    found = fp8_experts(x, ids, weights, *packed)
    expected = torch.zeros_like(x)
    for token in range(9):
        for slot in range(2):
            expert = int(ids[token, slot])
            gate, up = (fake(x[token : token + 1], (1, 128)) @ fake(matrices[0][expert], (128, 128)).T).chunk(2, -1)
            hidden = fake(F.silu(gate) * up, (1, 128))
            expected[token] += weights[token, slot] * (hidden @ fake(matrices[1][expert], (128, 128)).T)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    arguments = (x.bfloat16(), ids, weights, *packed)
    torch.library.opcheck(fp8_experts, arguments, test_utils="test_faketensor")

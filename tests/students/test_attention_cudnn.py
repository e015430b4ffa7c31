"""cuDNN's ragged attention: as an operator of torch (with a stand-in for the kernels), and on a GPU the kernels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from students import attention_cudnn
from students.attention_cudnn import _Uid, packed_attention

Uids = dict[_Uid, Tensor]


def by_example(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float) -> Tensor:
    """[N,H,D] from an example at a time."""
    parts = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        one = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def stand_in(plan: Any, tensors: Uids, ends: Tensor, longest: int, scale: float) -> None:
    """What _run does, written out: autograd does not reach into an operator."""
    q, k, v = (tensors[uid].transpose(0, 1) for uid in (_Uid.Q, _Uid.K, _Uid.V))
    group = q.shape[0] // k.shape[0]
    k_HND, v_HND = (x.repeat_interleave(group, 0) for x in (k, v))
    position = torch.arange(q.shape[1])
    example = torch.searchsorted(ends, position, right=True)
    seen = (example[:, None] == example) & (position[:, None] >= position)
    p_HNN = (q @ k_HND.transpose(1, 2) * scale).masked_fill(~seen, float("-inf")).softmax(-1)
    if plan is attention_cudnn._forward_plan:
        tensors[_Uid.OUT].copy_((p_HNN @ v_HND).transpose(0, 1))
        tensors[_Uid.STATS].fill_(1.0)
        return
    grad = tensors[_Uid.GRAD_OUT].transpose(0, 1)
    gp = grad @ v_HND.transpose(1, 2)
    gs = p_HNN * (gp - (gp * p_HNN).sum(-1, keepdim=True)) * scale
    found = gs @ k_HND, (gs.transpose(1, 2) @ q), p_HNN.transpose(1, 2) @ grad
    for uid, g in zip((_Uid.GRAD_Q, _Uid.GRAD_K, _Uid.GRAD_V), found, strict=True):
        tensors[uid].copy_((g if uid == _Uid.GRAD_Q else g.unflatten(0, (-1, group)).sum(1)).transpose(0, 1))


def inputs(lengths: list[int], size: int, device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    shapes = [(sum(lengths), heads, size) for heads in (6, 2, 2)]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes], ends.to(device)


def test_operator_obeys_torchs_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cudnn, "_run", stand_in)
    qkv, ends = inputs([5, 1, 9], 8, "cpu", torch.float32)
    torch.library.opcheck(torch.ops.students.cudnn_attention.default, (*qkv, ends, 9, 0.3))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_reach_all_inputs(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cudnn, "_run", stand_in)
    torch.compiler.reset()
    attend = torch.compile(packed_attention, backend="aot_eager", dynamic=True) if compiled else packed_attention
    for lengths in ([5, 1, 9], [3, 3], [20]):
        qkv, ends = inputs(lengths, 8, "cpu", torch.float32)
        out = attend(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv), ends, max(lengths), 0.3)
        expected = by_example(*qkv, ends, 0.3)
        weight = torch.randn_like(out)
        found = torch.autograd.grad((out * weight).sum(), qkv)
        for ours, theirs in zip(found, torch.autograd.grad((expected * weight).sum(), qkv), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(out, expected)


@pytest.mark.skipif(not torch.cuda.is_available() or not attention_cudnn.available(), reason="no Hopper or no package")
@pytest.mark.parametrize(
    ("lengths", "size"), [([300, 1, 129, 700], 128), ([1500], 64), ([17, 5, 8, 1, 33, 64, 2, 128, 40, 3], 16)]
)
def test_kernels_agree_with_float64(lengths: list[int], size: int) -> None:
    """The bound is twice the error of torch's own kernels for one example at a time in bfloat16."""
    qkv, ends = inputs(lengths, size, "cuda", torch.bfloat16)
    weight = torch.randn(sum(lengths), 6, size, device="cuda", dtype=torch.bfloat16)
    scale = size**-0.5

    def run(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [out.detach().double(), *(g.double() for g in torch.autograd.grad(out, leaves, weight.to(out.dtype)))]

    exact = [x.detach().double().requires_grad_() for x in qkv]
    truth = run(by_example(*exact, ends, scale), exact)
    theirs = run(by_example(*qkv, ends, scale), qkv)
    ours = run(packed_attention(*qkv, ends, max(lengths), scale), qkv)
    for found, other, true in zip(ours, theirs, truth, strict=True):
        assert found.isfinite().all()
        assert (found - true).norm() < 2 * (other - true).norm() + 1e-3 * true.norm()

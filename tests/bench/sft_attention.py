"""Attention over packed examples on a GPU: the kernels at hand, forward and backward, at a student's shapes.

    python -m tests.bench.sft_attention [--tokens 16384] [--heads 12] [--kv-heads 2] [--size 128] [--only NAME ...]

Examples are those of tests.bench.sft_gpu. TFLOP/s count the products that causal attention needs (2 forward, 5
backward with the scores made anew, half of each square); the error is against float32, in norm, beside that of the
first kernel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.bench.sft_gpu import lengths_of

Attend = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]  # [N,H,D], [N,K,D] x2 -> [N,H,D]


def boundaries(lengths: list[int], pad_to: int = 0) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    more = max(0, pad_to - len(lengths))
    return torch.cat([ends, ends[-1:].expand(more)]).cuda()


def varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    from students.attention import _varlen

    out = _varlen(*(x.transpose(0, 1)[None] for x in (q, k, v)), None, boundaries(lengths), max(lengths))
    return out[0]


class _Cudnn(torch.autograd.Function):
    """torch's own cuDNN operators, told where each example begins."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        found = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, ends, ends, longest, longest, True, 0.0, True, False, scale=q.shape[-1] ** -0.5
        )
        out, lse, seed, offset = found[0], found[1], found[6], found[7]
        ctx.save_for_backward(q, k, v, out, lse, ends, seed, offset)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, ends, seed, offset = ctx.saved_tensors
        n = ctx.longest
        grads = torch.ops.aten._cudnn_attention_backward(
            grad.contiguous(), q, k, v, out, lse, seed, offset, None, ends, ends, n, n, 0.0, True,
            scale=q.shape[-1] ** -0.5,
        )  # fmt: skip
        return (*grads, None, None)


def cudnn_packed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return _Cudnn.apply(q, k, v, boundaries(lengths), max(lengths))


def cudnn_packed_rounded(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Numbers that recur: a plan of cuDNN's serves for all rows of as many examples and as long a longest one."""
    return _Cudnn.apply(q, k, v, boundaries(lengths, -(-len(lengths) // 16) * 16), -(-max(lengths) // 4096) * 4096)


def cudnn_packed_expanded(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return _Cudnn.apply(q, k, v, boundaries(lengths), max(lengths))


def each(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        parts = []
        with sdpa_kernel(backend):
            for part in zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True):
                parts.append(F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True))
        return torch.cat(parts, 2)[0].transpose(0, 1)

    return attend


_FLEX: dict[str, Any] = {}


def flex(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not _FLEX:
        _FLEX["attend"] = torch.compile(flex_attention)
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
        _FLEX["mask"] = torch.compile(create_block_mask)(
            lambda b, h, i, j: (i >= j) & (document[i] == document[j]), None, None, len(q), len(q), device="cuda"
        )
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _FLEX["attend"](q, k, v, block_mask=_FLEX["mask"], enable_gqa=True)[0].transpose(0, 1)


def flash4(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    ends = boundaries(lengths)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=max(lengths), max_seqlen_k=max(lengths), causal=True
    )[0]


WAYS: dict[str, Attend] = {
    "varlen (flash 2)": varlen, "cudnn packed": cudnn_packed, "cudnn packed, rounded": cudnn_packed_rounded,
    "cudnn packed, expanded": cudnn_packed_expanded, "cudnn each": each(SDPBackend.CUDNN_ATTENTION), "flex": flex,
    "flash 4": flash4,
}  # fmt: skip


def truth(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return each(SDPBackend.EFFICIENT_ATTENTION)(q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)),
                                                lengths)  # fmt: skip


def run(attend: Attend, qkv: tuple[Tensor, ...], grad: Tensor, lengths: list[int]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(leaves[0], leaves[1], leaves[2], lengths)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def timed(work: Callable[..., Any], *arguments: Any, rounds: int = 5) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(rounds):
        work(*arguments)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description="See the module's text.")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    args = parser.parse_args()
    lengths = lengths_of(args.tokens, 3)
    torch.manual_seed(0)
    shapes = [(args.tokens, heads, args.size) for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)]
    *qkv32, grad32 = (torch.randn(shape, device="cuda") for shape in shapes)
    expected = run(truth, tuple(qkv32), grad32, lengths)
    qkv, grad = tuple(x.bfloat16() for x in qkv32), grad32.bfloat16()
    flop = 2 * args.heads * args.size * sum(n * n for n in lengths)  # the two products of the forward pass, causal
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; "
          f"{len(lengths)} examples of up to {max(lengths)} tokens")  # fmt: skip
    for name in args.only:
        attend = WAYS[name]
        began = time.perf_counter()
        try:
            found = run(attend, qkv, grad, lengths)
            torch.cuda.synchronize()
            first = time.perf_counter() - began
            errors = [float((f.float() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]
            with torch.no_grad():
                forward = timed(attend, *qkv, lengths)
            both = timed(run, attend, qkv, grad, lengths)
        except Exception as error:  # one kernel that is not there must not cost the others
            print(f"{name:<24} {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        backward = both - forward
        print(
            f"{name:<24} forward {forward:6.2f} ms {flop / forward / 1e9:4.0f} TFLOP/s   "
            f"backward {backward:6.2f} ms {2.5 * flop / backward / 1e9:4.0f} TFLOP/s   first call {first:.1f} s   "
            f"errors {' '.join(f'{e:.1e}' for e in errors)}",
            flush=True,
        )


if __name__ == "__main__":
    main()

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
    from torch.nn.attention.varlen import varlen_attn

    from students.attention import GROUPED

    ends, longest = boundaries(lengths), max(lengths)
    out: Tensor = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **GROUPED)
    return out


def cudnn_ragged(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    from students.attention_cudnn import packed_attention

    return packed_attention(q, k, v, boundaries(lengths), max(lengths), q.shape[-1] ** -0.5)


def cudnn_ragged_wide(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """With a plan for more and longer examples than there are: what does it cost?"""
    from students.attention_cudnn import packed_attention

    return packed_attention(q, k, v, boundaries(lengths, 32), len(q), q.shape[-1] ** -0.5)


class _CudnnEach(torch.autograd.Function):
    """torch's cuDNN kernels, an example at a time, lengths rounded up so that plans are few.

    What an example sees of its follower lies in its future, so it does not matter; its gradient is cut off.
    """

    STEP = 512

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        ctx.lengths, ctx.parts, out, start = lengths, [], torch.empty_like(q), 0
        for n in lengths:
            views = [_CudnnEach.view(x, start, n) for x in (q, k, v)]
            found = torch.ops.aten._scaled_dot_product_cudnn_attention(*views, None, True, 0.0, True, False, scale=None)
            out[start : start + n] = found[0][0, :, :n].transpose(0, 1)
            ctx.parts.append((*views, found[0], found[1], found[6], found[7]))
            start += n
        return out

    @staticmethod
    def view(x: Tensor, start: int, n: int) -> Tensor:
        """[1,H,L,D] with L >= n, dense in [L,H,D]."""
        length = -(-n // _CudnnEach.STEP) * _CudnnEach.STEP
        part = x[start : start + length]
        if len(part) < length:
            part = F.pad(part, (0, 0, 0, 0, 0, length - len(part)))
        _, heads, size = x.shape
        return part.as_strided((1, heads, length, size), (length * heads * size, size, heads * size, 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found: list[list[Tensor]] = []
        start = 0
        for n, (q, k, v, out, lse, seed, offset) in zip(ctx.lengths, ctx.parts, strict=True):
            length = q.shape[2]
            part = F.pad(grad[start : start + n], (0, 0, 0, 0, 0, length - n)).transpose(0, 1)[None]
            grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                part, q, k, v, out, lse, seed, offset, None, None, None, length, length, 0.0, True, scale=None
            )
            found.append([g[0, :, :n].transpose(0, 1) for g in grads])
            start += n
        return (*(torch.cat(parts) for parts in zip(*found, strict=True)), None)


def cudnn_each(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return _CudnnEach.apply(q, k, v, lengths)


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


WAYS: dict[str, Attend] = {
    "flash 2 (torch)": varlen, "cudnn ragged": cudnn_ragged, "cudnn ragged, wide": cudnn_ragged_wide,
    "cudnn each": cudnn_each, "cudnn each, exact": each(SDPBackend.CUDNN_ATTENTION), "flex": flex,
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
    parser.add_argument("--row", type=int, default=3, help="number of the row of examples")
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    args = parser.parse_args()
    lengths = lengths_of(args.tokens, args.row)
    torch.manual_seed(0)
    shapes = [(args.tokens, heads, args.size) for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)]
    *qkv32, grad32 = (torch.randn(shape, device="cuda") for shape in shapes)
    expected = run(truth, tuple(qkv32), grad32, lengths)
    qkv, grad = tuple(x.bfloat16().requires_grad_() for x in qkv32), grad32.bfloat16()
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
            run(attend, qkv, grad, lengths)
            both = timed(run, attend, qkv, grad, lengths)
            forward = timed(attend, *qkv, lengths)
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

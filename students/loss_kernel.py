"""The Triton kernel of students.loss: logits to their gradient, in place, in two readings and one writing.

One program takes a row: the first pass finds its largest logit and the sum of exponentials together (Milakov and
Gimelshein, arXiv 1805.02867), the second writes softmax - onehot over the logits. What the first reads is mostly still
in the cache for the second: a row of 152k bfloat16 logits is 300 KB. Everything is computed in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit
def _kernel(logits_ptr, targets_ptr, losses_ptr, row_stride, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    counts = target >= 0
    offsets = tl.arange(0, BLOCK)
    largest_B = tl.full((BLOCK,), float("-inf"), tl.float32)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        x_B = tl.load(logits_ptr + start + offsets, start + offsets < vocabulary, float("-inf")).to(tl.float32)
        higher_B = tl.maximum(largest_B, x_B)
        # A lane that has seen nothing but -inf has nothing to scale.
        old_B = tl.where(largest_B == float("-inf"), 0.0, tl.exp(largest_B - higher_B))
        sum_B = sum_B * old_B + tl.where(x_B == float("-inf"), 0.0, tl.exp(x_B - higher_B))
        largest_B = higher_B
    largest = tl.max(largest_B)
    total = tl.sum(tl.where(sum_B == 0.0, 0.0, sum_B * tl.exp(largest_B - largest)))
    at_target = tl.load(logits_ptr + tl.where(counts, target, 0)).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(counts, largest + tl.log(total) - at_target, 0.0))
    scale = tl.where(counts, 1.0 / total, 0.0)
    tl.debug_barrier()  # the target's logit is read before it is written over
    for start in range(0, vocabulary, BLOCK):
        inside_B = start + offsets < vocabulary
        x_B = tl.load(logits_ptr + start + offsets, inside_B, float("-inf")).to(tl.float32)
        p_B = tl.exp(x_B - largest) * scale
        p_B -= tl.where(start + offsets == target, 1.0, 0.0)
        tl.store(logits_ptr + start + offsets, p_B.to(logits_ptr.dtype.element_ty), inside_B)


def to_gradient(logits_CV: Tensor, targets_C: Tensor, losses_C: Tensor) -> None:
    """As students.loss._to_gradient: fills `losses_C` and turns the logits (rows dense) into the gradient, in place.

    A negative target has loss 0 and gradient 0. A row with a logit that is not finite has a loss that is not finite.
    """
    assert logits_CV.stride(1) == 1 and losses_C.is_contiguous() and targets_C.is_contiguous()
    with torch.cuda.device_of(logits_CV):
        _kernel[(len(logits_CV),)](
            logits_CV, targets_C, losses_C, logits_CV.stride(0), logits_CV.shape[1], BLOCK=BLOCK, num_warps=16
        )

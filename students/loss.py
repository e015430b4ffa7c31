"""Cross-entropy over a vocabulary too large for its logits to be held: a chunk of positions at a time.

A row of 16k tokens over Qwen2.5's 152k words has 10 GB of logits in float32, and cross-entropy reads and writes them
several times. Here the model is asked for what goes into its head instead, and a chunk's logits live only until its
loss and gradient are taken, both in the forward pass; backward scales what is there. Products are in the type that
autocast would have used, sums in float32, so that the result is that of the plain way up to rounding.

Legend: K positions with a target, C of them in a chunk, D hidden size, V vocabulary.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.packing import IGNORED

_log = logging.getLogger(__name__)
PLAIN_LOGITS = 1 << 27  # up to so many (0.5 GiB in float32) the logits are simply made
CHUNK_LOGITS = 1 << 30  # most logits held at a time (2 GiB in bfloat16)


def summed_cross_entropy(hidden_KD: Tensor, weight_VD: Tensor, targets_K: Tensor) -> Tensor:
    """Sum of the cross-entropies of softmax(hidden @ weight.T), float32 scalar; 0 where a target is IGNORED."""
    total: Tensor = _HeadLoss.apply(hidden_KD, weight_VD, targets_K, torch.is_grad_enabled())
    return total


@contextlib.contextmanager
def without_head(head: nn.Linear) -> Iterator[None]:
    """Inside, the model hands out what its head would have been given in place of logits."""
    head.forward = _same  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


def large_head(model: nn.Module, positions: int) -> nn.Linear | None:
    """The layer whose output the model returns as logits, if those of `positions` would be too many to hold.

    The layer must be a matrix product and nothing else. None for sharded weights (FSDP gathers them only for the
    model's own forward pass), for a head with a bias or with adapters, and for models that do something to the logits
    afterwards (Gemma's cap, Cohere's scale), which is found out with one token; the reason is logged once.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    config = getattr(model, "config", None)
    if positions * getattr(config, "vocab_size", 0) <= PLAIN_LOGITS:
        return None
    found = getattr(model, "get_output_embeddings", lambda: None)()
    if found is None:
        return None
    if not hasattr(found, "_reason_against_chunks"):
        found._reason_against_chunks = reason = _reason_against(model, found)
        if reason:
            _log.warning("all logits are held at once: %s", reason)
    return None if found._reason_against_chunks else found


def _reason_against(model: nn.Module, head: nn.Module) -> str:
    if any(type(module).__name__.startswith("FullyShardedDataParallel") for module in model.modules()):
        return "the weights are sharded (FSDP)"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}"
    if type(head.weight) is not nn.Parameter:
        return "the head's weight is sharded"
    if head.bias is not None:
        return "the head has a bias"
    return "" if _makes_the_logits(model, head) else "the model does more to its logits than to multiply"


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _makes_the_logits(model: nn.Module, head: nn.Linear) -> bool:
    made: list[Tensor] = []
    watch = head.register_forward_hook(lambda _, __, output: made.append(output))
    device = head.weight.device
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda), torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False).logits
    finally:
        watch.remove()
    return len(made) == 1 and torch.equal(made[0].float(), logits.float())


class _HeadLoss(torch.autograd.Function):
    """The gradient is taken while a chunk's logits are there; only those of hidden and weight are kept."""

    @staticmethod
    def forward(ctx: Any, hidden_KD: Tensor, weight_VD: Tensor, targets_K: Tensor, training: bool) -> Tensor:
        device = hidden_KD.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_KD.dtype
        wants_hidden, wants_weight = (training and wanted for wanted in ctx.needs_input_grad[:2])
        low_weight_VD = weight_VD.detach().to(low)
        losses_K = torch.empty(len(hidden_KD), dtype=torch.float32, device=hidden_KD.device)
        grad_hidden_KD = torch.empty_like(hidden_KD) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        with torch.autocast(device, enabled=False):
            for begin in range(0, len(hidden_KD), step := _chunk_size(weight_VD.shape[0])):
                part = slice(begin, begin + step)
                hidden_CD = hidden_KD[part].to(low)
                logits_CV = hidden_CD @ low_weight_VD.T
                _to_gradient(logits_CV, targets_K[part], losses_K[part])
                if grad_hidden_KD is not None:
                    grad_hidden_KD[part] = logits_CV @ low_weight_VD
                if grad_weight_VD is not None:
                    _add_product(grad_weight_VD, logits_CV.T, hidden_CD)
        ctx.save_for_backward(grad_hidden_KD, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        return losses_K.sum()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight = (None if grad is None else grad * grad_total for grad in ctx.saved_tensors)
        return hidden, weight, None, None


def _chunk_size(vocabulary: int) -> int:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return size if size < 128 else size // 128 * 128  # whole tiles of the matrix products


def _to_gradient(logits_CV: Tensor, targets_C: Tensor, losses_C: Tensor) -> None:
    """Fill `losses_C`, and turn the logits into the gradient of the losses' sum, in place."""
    if logits_CV.is_cuda:
        from students.loss_kernel import to_gradient

        to_gradient(logits_CV, targets_C, losses_C)
        return
    log_p_CV = F.log_softmax(logits_CV.float(), dim=-1)
    losses_C.copy_(F.nll_loss(log_p_CV, targets_C, reduction="none", ignore_index=IGNORED))
    p_CV = log_p_CV.exp_()
    p_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C.clamp(min=0)] -= 1.0
    p_CV[targets_C == IGNORED] = 0.0
    logits_CV.copy_(p_CV)


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """sum += left @ right, summed in float32."""
    if sum_VD.is_cuda and left_VC.dtype != torch.float32:
        torch.addmm(sum_VD, left_VC, right_CD, out_dtype=torch.float32, out=sum_VD)
    else:
        sum_VD += (left_VC @ right_CD).float()

"""Attention for training, registered with transformers as "students": packed rows on any device, and fast on a CPU.

A packed batch is one row [1, N] of examples laid end to end. Examples cannot see each other because each is its own
sequence to the kernel, not because a mask says so:

    GPU    cuDNN's ragged attention (students.attention_cudnn) where it is installed, on Hopper and later; else torch's
           variable-length flash attention, told alike where each example begins
    CPU    the row is folded into [examples, longest] for this one operation, so that linear layers, norms and the loss
           still see no padding at all

A batch without `cu_seq_lens_q` is plain rows [B, T]: causal, and with the padding on the right no mask is needed, since
no token looks to its right.

In bfloat16 on a CPU the scores are written out: torch's CPU flash backward is 2 to 4 times slower there (measured with
32-wide heads, 128 to 256 tokens), while the matrix products run on bfloat16 hardware where there is any.

Shapes: B rows, N tokens in all, T longest example, E examples, H query heads, K key/value heads, D head size.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from students import attention_cudnn

NAME = "students"
# torch 2.11 takes grouped heads without being asked; later versions want to be told.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def use_training_attention(model: Any) -> None:
    """Switch `model` to this attention. Raises ValueError for what it does not do: sliding windows, dropout."""
    from transformers import AttentionInterface

    if "sliding_attention" in (getattr(model.config, "layer_types", None) or []):
        raise ValueError(f"{model.config.name_or_path}: sliding-window attention cannot be trained here")
    if getattr(model.config, "attention_dropout", 0.0):
        raise ValueError(f"{model.config.name_or_path}: attention_dropout is not supported; set it to 0 in config.json")
    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)


def fold_indices(lengths: list[int]) -> dict[str, Any]:
    """What the attention must know of a packed row: where each example starts, and how to fold the row and back.

    `cu_seq_lens_q` [E+1] int32; `max_length_q`; `fold_index` [E, T]: the row's position in each folded slot, padding
    slots repeating the last token; `unfold_index` [N]: the folded slot of each position.
    """
    lengths_E = torch.tensor(lengths)
    starts_E = lengths_E.cumsum(0) - lengths_E
    total, longest = int(lengths_E.sum()), max(lengths)
    fold_ET = (starts_E[:, None] + torch.arange(longest)).clamp(max=total - 1)
    position_N = torch.cat([torch.arange(length) for length in lengths])
    unfold_N = torch.repeat_interleave(torch.arange(len(lengths)) * longest, lengths_E) + position_N
    boundaries = torch.cat([starts_E, torch.tensor([total])]).to(torch.int32)
    return {"cu_seq_lens_q": boundaries, "max_length_q": longest, "fold_index": fold_ET, "unfold_index": unfold_N}


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    fold_index: Tensor | None = None,
    unfold_index: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B,H,N,D], key and value [B,K,N,D] -> [B,N,H,D]."""
    assert attention_mask is None and dropout == 0.0
    if torch.is_autocast_enabled(query.device.type):
        # Rotary tables in float32 have raised q and k; the kernels want one type, and autocast's is the meant one.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if cu_seq_lens_q is None:
        return _causal(query, key, value, scaling).transpose(1, 2), None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, scaling, cu_seq_lens_q, max_length_q), None
    assert fold_index is not None and unfold_index is not None

    def fold(x_1HND: Tensor) -> Tensor:
        x_NHD = x_1HND[0].transpose(0, 1)
        return x_NHD[fold_index.flatten()].unflatten(0, fold_index.shape).transpose(1, 2)

    out_EHTD = _causal(fold(query), fold(key), fold(value), scaling)
    return out_EHTD.transpose(1, 2).flatten(0, 1)[unfold_index][None], None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, boundaries: Tensor, longest: int
) -> Tensor:
    q_NHD, k_NKD, v_NKD = (x[0].transpose(0, 1) for x in (query, key, value))
    if attention_cudnn.serves(query, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention_cudnn.packed_attention(q_NHD, k_NKD, v_NKD, boundaries, longest, scale)[None]
    out_NHD: Any = varlen_attn(
        q_NHD, k_NKD, v_NKD, boundaries, boundaries, longest, longest, scale=scaling, window_size=(-1, 0), **GROUPED
    )
    return out_NHD[None]


def _causal(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scaling: float | None) -> Tensor:
    """Plain causal attention within each row -> [B,H,T,D]."""
    if q_BHTD.device.type != "cpu" or q_BHTD.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(
            q_BHTD, k_BKTD, v_BKTD, is_causal=True, scale=scaling, enable_gqa=q_BHTD.shape[1] != k_BKTD.shape[1]
        )
    batch, heads, length, size = q_BHTD.shape
    group = heads // k_BKTD.shape[1]
    k_XTD, v_XTD = (x.repeat_interleave(group, 1).flatten(0, 1) for x in (k_BKTD, v_BKTD))
    future_TT = torch.full((length, length), float("-inf"), dtype=q_BHTD.dtype).triu_(1)
    with torch.autocast("cpu", enabled=False):  # the softmax sums in float32 by itself
        scores_XTT = torch.baddbmm(
            future_TT.expand(batch * heads, -1, -1), q_BHTD.flatten(0, 1), k_XTD.transpose(1, 2),
            alpha=size**-0.5 if scaling is None else scaling,
        )  # fmt: skip
        out_XTD = scores_XTT.softmax(-1) @ v_XTD
    return out_XTD.unflatten(0, (batch, heads))

"""cuDNN's fused attention over a packed row: half the time of flash attention 2 on Hopper, for head sizes up to 128.

torch has these kernels too, but only for rows of one length (its ragged backward pass is missing). cuDNN itself takes
ragged rows: each example has an offset into the row and a length, both read on the device. A plan is made for the
numbers of heads and the most examples, the longest example and the most tokens that it may meet; these are rounded up
to powers of two, so that a training needs a handful of plans, each made in about a second. Examples that are not there
have length 0. Needs the package nvidia-cudnn-frontend, which is a few megabytes and uses the cuDNN that torch brings.

Legend: N tokens of the row, E examples, H query heads, K key/value heads, D head size.
"""

import functools
import importlib.util
import logging
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
LEAST_EXAMPLES, LEAST_TOKENS = 8, 1024


class _Uid(IntEnum):
    """cuDNN's names of the tensors, the same in both graphs."""

    Q = auto()
    K = auto()
    V = auto()
    OUT = auto()
    STATS = auto()
    GRAD_OUT = auto()
    GRAD_Q = auto()
    GRAD_K = auto()
    GRAD_V = auto()
    LENGTHS = auto()
    Q_OFFSETS = auto()
    K_OFFSETS = auto()
    STATS_OFFSETS = auto()


@dataclass(frozen=True)
class _Shape:
    """What a plan is made for; the last three are the most it takes."""

    device: int
    heads: int
    kv_heads: int
    size: int
    scale: float
    examples: int
    longest: int
    tokens: int


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the package is there, and the GPU one that its kernels are for (Hopper or later). Logged once."""
    return _available()


@functools.cache
def _available() -> bool:
    if torch.cuda.get_device_capability() < (9, 0):
        return False
    found = importlib.util.find_spec("cudnn") is not None
    missing = "torch's flash attention 2 (nvidia-cudnn-frontend, our extra gpu, is not installed: twice as slow)"
    _log.info("packed rows attend through %s", "cuDNN" if found else missing)
    return found


def serves(query: Tensor, value: Tensor) -> bool:
    """Whether the kernels are there and take tensors like these, [1,H,N,D] and [1,K,N,D]."""
    size = query.shape[-1]
    return query.dtype == torch.bfloat16 and size <= 128 and size % 8 == 0 == size - value.shape[-1] and available()


def packed_attention(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, ends_E1: Tensor, longest: int, scale: float
) -> Tensor:
    """Causal attention within each example; `ends_E1` [E+1] int32 are their boundaries. Returns [N,H,D]."""
    out_NHD: Tensor = torch.ops.students.cudnn_attention(q_NHD, k_NKD, v_NKD, ends_E1, longest, scale)[0]
    return out_NHD


@torch.library.custom_op("students::cudnn_attention", mutates_args=())
def _forward(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, ends_E1: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    q_NHD, k_NKD, v_NKD = q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
    out_NHD = torch.empty_like(q_NHD)
    stats_NH = torch.empty(q_NHD.shape[:2], dtype=torch.float32, device=q_NHD.device)
    tensors = {_Uid.Q: q_NHD, _Uid.K: k_NKD, _Uid.V: v_NKD, _Uid.OUT: out_NHD, _Uid.STATS: stats_NH}
    _run(_forward_plan, tensors, ends_E1, longest, scale)
    return out_NHD, stats_NH


@_forward.register_fake
def _(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, ends_E1: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    return q_NHD.new_empty(q_NHD.shape), q_NHD.new_empty(q_NHD.shape[:2], dtype=torch.float32)


@torch.library.custom_op("students::cudnn_attention_backward", mutates_args=())
def _backward(
    grad_NHD: Tensor, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, out_NHD: Tensor, stats_NH: Tensor,
    ends_E1: Tensor, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q_NHD, k_NKD, v_NKD = q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
    grads = torch.empty_like(q_NHD), torch.empty_like(k_NKD), torch.empty_like(v_NKD)
    tensors = {
        _Uid.Q: q_NHD, _Uid.K: k_NKD, _Uid.V: v_NKD, _Uid.OUT: out_NHD, _Uid.STATS: stats_NH,
        _Uid.GRAD_OUT: grad_NHD.contiguous(), _Uid.GRAD_Q: grads[0], _Uid.GRAD_K: grads[1], _Uid.GRAD_V: grads[2],
    }  # fmt: skip
    _run(_backward_plan, tensors, ends_E1, longest, scale)
    return grads


@_backward.register_fake
def _(
    grad_NHD: Tensor, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, out_NHD: Tensor, stats_NH: Tensor,
    ends_E1: Tensor, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q_NHD.new_empty(q_NHD.shape), k_NKD.new_empty(k_NKD.shape), v_NKD.new_empty(v_NKD.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_NHD, k_NKD, v_NKD, ends_E1, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(q_NHD, k_NKD, v_NKD, *output, ends_E1)


def _differentiate(ctx: Any, grad_NHD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *kept, ends_E1 = ctx.saved_tensors
    grads = torch.ops.students.cudnn_attention_backward(grad_NHD, *kept, ends_E1, ctx.longest, ctx.scale)
    return (*grads, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


def _run(plan: Any, tensors: dict[_Uid, Tensor], ends_E1: Tensor, longest: int, scale: float) -> None:
    import cudnn

    query, key = tensors[_Uid.Q], tensors[_Uid.K]
    tokens, heads, size = query.shape
    examples = _power_of_two(len(ends_E1) - 1, LEAST_EXAMPLES)
    most = _power_of_two(tokens, LEAST_TOKENS)
    longest = min(most, _power_of_two(longest, LEAST_TOKENS))
    shape = _Shape(query.device.index, heads, key.shape[1], size, scale, examples, longest, most)
    with torch.cuda.device(query.device):
        graph, room = plan(shape)
        ends = torch.cat([ends_E1, ends_E1[-1:].expand(examples + 1 - len(ends_E1))])
        given: dict[int, Any] = {int(uid): tensor for uid, tensor in tensors.items()} | {
            int(_Uid.LENGTHS): ends.diff(), int(_Uid.STATS_OFFSETS): ends * heads,
            int(_Uid.Q_OFFSETS): ends * (heads * size), int(_Uid.K_OFFSETS): ends * (shape.kv_heads * size),
        }  # fmt: skip
        handle = _handle(query.device.index)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(given, torch.empty(room, dtype=torch.uint8, device=query.device), handle=handle)


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


@functools.cache
def _handle(device: int) -> Any:
    import cudnn

    return cudnn.create_handle()


@functools.cache
def _forward_plan(shape: _Shape) -> tuple[Any, int]:
    graph, given = _graph(shape)
    out, stats = graph.sdpa(
        name="attention",
        q=given[_Uid.Q],
        k=given[_Uid.K],
        v=given[_Uid.V],
        generate_stats=True,
        **_options(shape, given),
    )
    _ragged(out, shape.heads, shape, given[_Uid.Q_OFFSETS]).set_output(True).set_uid(_Uid.OUT)
    _stats(stats, shape, given).set_output(True).set_uid(_Uid.STATS)
    return _built(graph)


@functools.cache
def _backward_plan(shape: _Shape) -> tuple[Any, int]:
    import cudnn

    graph, given = _graph(shape)
    like_q = _dim_stride(shape, shape.heads)
    out, grad_out = (graph.tensor(name=uid.name, uid=uid, **like_q) for uid in (_Uid.OUT, _Uid.GRAD_OUT))
    for tensor in (out, grad_out):
        tensor.set_ragged_offset(given[_Uid.Q_OFFSETS])
    stats = graph.tensor(name="STATS", uid=_Uid.STATS, data_type=cudnn.data_type.FLOAT, dim=[1] * 4, stride=[1] * 4)
    grads = graph.sdpa_backward(
        name="attention_backward", q=given[_Uid.Q], k=given[_Uid.K], v=given[_Uid.V], o=out, dO=grad_out,
        stats=_stats(stats, shape, given), max_total_seq_len_q=shape.tokens, max_total_seq_len_kv=shape.tokens,
        **_options(shape, given),
    )  # fmt: skip
    uids, offsets = (_Uid.GRAD_Q, _Uid.GRAD_K, _Uid.GRAD_V), (_Uid.Q_OFFSETS, _Uid.K_OFFSETS, _Uid.K_OFFSETS)
    for grad, uid, heads, at in zip(grads, uids, (shape.heads, shape.kv_heads, shape.kv_heads), offsets, strict=True):
        _ragged(grad, heads, shape, given[at]).set_output(True).set_uid(uid)
    return _built(graph)


def _graph(shape: _Shape) -> tuple[Any, dict[_Uid, Any]]:
    """A graph with the tensors that both passes are given: q, k and v, lengths and offsets."""
    import cudnn

    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.BFLOAT16, intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT, handle=_handle(shape.device),
    )  # fmt: skip
    given = {}
    for uid in (_Uid.LENGTHS, _Uid.Q_OFFSETS, _Uid.K_OFFSETS, _Uid.STATS_OFFSETS):
        count = shape.examples if uid == _Uid.LENGTHS else shape.examples + 1
        given[uid] = graph.tensor(
            name=uid.name, uid=uid, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=cudnn.data_type.INT32
        )
    for uid in (_Uid.Q, _Uid.K, _Uid.V):
        heads, at = (shape.heads, _Uid.Q_OFFSETS) if uid == _Uid.Q else (shape.kv_heads, _Uid.K_OFFSETS)
        given[uid] = graph.tensor(name=uid.name, uid=uid, **_dim_stride(shape, heads))
        given[uid].set_ragged_offset(given[at])
    return graph, given


def _options(shape: _Shape, given: dict[_Uid, Any]) -> dict[str, Any]:
    lengths = given[_Uid.LENGTHS]
    return {
        "attn_scale": shape.scale, "use_causal_mask": True, "use_padding_mask": True, "seq_len_q": lengths,
        "seq_len_kv": lengths,
    }  # fmt: skip


def _dim_stride(shape: _Shape, heads: int) -> dict[str, list[int]]:
    size, longest = shape.size, shape.longest
    return {
        "dim": [shape.examples, heads, longest, size], "stride": [longest * heads * size, size, heads * size, 1],
    }  # fmt: skip


def _ragged(tensor: Any, heads: int, shape: _Shape, offsets: Any) -> Any:
    layout = _dim_stride(shape, heads)
    tensor.set_dim(layout["dim"]).set_stride(layout["stride"]).set_ragged_offset(offsets)
    return tensor


def _stats(tensor: Any, shape: _Shape, given: dict[_Uid, Any]) -> Any:
    """The logarithms of the softmax's sums lie as [N,H] in float32."""
    import cudnn

    dim = [shape.examples, shape.heads, shape.longest, 1]
    tensor.set_dim(dim).set_stride([shape.longest * shape.heads, 1, shape.heads, 1])
    tensor.set_data_type(cudnn.data_type.FLOAT).set_ragged_offset(given[_Uid.STATS_OFFSETS])
    return tensor


def _built(graph: Any) -> tuple[Any, int]:
    """(the graph with its plan, bytes of workspace). cuDNN raises its own error for what it cannot do."""
    import cudnn

    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph, max(1, graph.get_workspace_size())

"""Attention of newly decoded tokens over the paged latent cache, in the absorbed form of DeepSeek-V2 section 2.1.2.

Every head reads the same entry, a latent of R values and a rotary key of D: a score is q_latent·latent + q_rope·key,
and what is attended to is the latent again. The keys of a sequence are split over programs, whose parts a second kernel
merges by their log-sum-exp (flash decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Whatever the
values of a launch, it asks the host for nothing: lengths stay on the device, so a CUDA graph can hold it.

Floors, for a cached token seen by Q = T * H queries, R + D = 576 and R = 512:

    FLOP    2 Q (R + D) + 2 Q R = 2,176 Q
    bytes   1,152 in bf16, 656 in FP8, read once

which is 1.9 Q FLOP a byte in bf16 and 3.3 Q in FP8. An H200 measures 790 TFLOP/s in bf16 and 4.3 TB/s: 184 FLOP a byte.
So 16 heads and one token are bound by bytes (30 and 53 FLOP a byte), and 128 heads by FLOP (242 and 425): there the
ceiling is the BF16 rate, at most 76% of the bandwidth in bf16 and 43% in FP8. One program has 64 queries at most (its
output is 64 x 512 in fp32, half of an SM's registers), so at 128 heads two read each token, the second from the L2.
Parts add 4 (R + 1) bytes written and read a query a split, which matters for a short context of few sequences alone.

Which kernel: Triton's anywhere, at any size; on Hopper, at R = 512 and D = 64, CUDA's where that is faster: see
mla_hopper.py.

Shapes: B sequences, T new tokens each, H heads, R = kv_lora_rank, D = qk_rope_head_dim, P pages of a sequence, G tokens
a page, W the cache's row: R + D of bf16, or teacher.kernels.mla_cache's bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from teacher.kernels import mla_hopper, mla_kernels
from teacher.kernels.arguments import INTERPRETED, obstacle, same_device
from teacher.kernels.mla_cache import TILE, row_bytes

_MOST_SPLITS = 128


class Config(NamedTuple):
    """How one launch is cut up."""

    block_n: int  # keys a tile
    warps: int
    stages: int  # tiles on their way
    programs: int  # that fit on an SM together


# By (FP8, queries of a program), measured on an H200: see docs/kernels.md.
CONFIGS = {
    (False, 16): Config(32, 4, 5, 2),
    (False, 32): Config(32, 4, 5, 2),
    (False, 64): Config(64, 8, 2, 1),
    (True, 16): Config(64, 4, 1, 2),
    (True, 32): Config(32, 4, 3, 2),
    (True, 64): Config(64, 8, 5, 1),
}


def cache_obstacle(rank: int, rope: int, page_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot serve a cache of this kind, or None."""
    if (missing := obstacle(device)) is not None:
        return missing
    if dtype not in (torch.bfloat16, torch.uint8):
        return f"it reads caches of bfloat16 or FP8 rows (uint8), not {dtype}"
    if rank > 512 or rope > 128:
        return f"it takes kv_lora_rank up to 512 and qk_rope_head_dim up to 128, not {rank} and {rope}"
    if page_size & (page_size - 1):
        return f"it takes pages of a power of two of tokens, not {page_size}"
    return None


def mla_decode(
    q_latent_BTHR: Tensor, q_rope_BTHD: Tensor, cache_PGW: Tensor, table_BP: Tensor, position_BT: Tensor, scale: float,
    first_B: Tensor | None = None, *, out: Tensor | None = None, splits: int | None = None,
    config: Config | None = None, path: Literal["triton", "cuda"] | None = None,
) -> Tensor:  # fmt: skip
    """Attended latents (B, T, H, R), bf16 or in `out`'s dtype.

    Query (b, t) sees positions `first_B[b]` (default 0) to `position_BT[b, t]` of its sequence, whose pages are
    `table_BP[b]`; position -1 is padding, sees nothing and gives zeros. Nothing else of the cache is read. Scores are
    multiplied by `scale`. `splits`, `config` (of Triton's kernel) and `path` override what is chosen from the shapes.
    Raises ValueError that names the tensor for shapes, dtypes and devices that it cannot take, or says why the path
    asked for cannot take them.
    """
    rows, tokens, heads, rank = q_latent_BTHR.shape
    page_size = cache_PGW.shape[1]
    _check(q_latent_BTHR, q_rope_BTHD, cache_PGW, table_BP, position_BT, first_B)
    if out is None:
        out = torch.empty(rows, tokens, heads, rank, dtype=q_latent_BTHR.dtype, device=q_latent_BTHR.device)
    elif out.shape != q_latent_BTHR.shape or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)}; expected contiguous {tuple(q_latent_BTHR.shape)}")
    if out.numel() == 0:
        return out
    fp8 = cache_PGW.dtype == torch.uint8
    queries = tokens * heads
    by_cuda = _by_cuda(path, config, q_latent_BTHR, q_rope_BTHD, cache_PGW, table_BP, out)
    block_m = min(64, max(16, triton.next_power_of_2(queries)))
    if by_cuda:
        block_m = mla_hopper.queries_of_program(fp8, queries)
        config = Config(mla_hopper.TILE, 12, 2, 1)
    elif config is None:
        config = CONFIGS[fp8, block_m]
    blocks = -(-queries // block_m)
    if splits is None:
        tiles = -(-table_BP.shape[1] * page_size // config.block_n)
        splits = choose_splits(rows * blocks, tiles, _processors(cache_PGW.device) * config.programs)
    elif not 1 <= splits <= _MOST_SPLITS:
        raise ValueError(f"splits is {splits}; expected 1 to {_MOST_SPLITS}")
    arguments = q_latent_BTHR, q_rope_BTHD, cache_PGW, table_BP, position_BT, scale, first_B
    if by_cuda:
        mla_hopper.launch(*arguments, out, splits, block_m)
    else:
        _launch_triton(*arguments, out, splits, block_m, config)
    return out


def _by_cuda(
    path: str | None, config: Config | None, q_latent_BTHR: Tensor, q_rope_BTHD: Tensor, cache_PGW: Tensor,
    table_BP: Tensor, out: Tensor,
) -> bool:  # fmt: skip
    """Whether the CUDA kernel is asked for, or can take this and is the faster one."""
    if path not in (None, "triton", "cuda"):
        raise ValueError(f"path is {path!r}; expected 'triton', 'cuda' or None")
    if path == "triton" or config is not None:
        return False
    queries = q_latent_BTHR.shape[1] * q_latent_BTHR.shape[2]
    tiles = -(-table_BP.numel() * cache_PGW.shape[1] // mla_hopper.TILE)
    if path is None and not mla_hopper.preferred(cache_PGW.dtype == torch.uint8, queries, tiles):
        return False
    missing = mla_hopper.obstacle(q_latent_BTHR, q_rope_BTHD, cache_PGW, out)
    if missing and path == "cuda":
        raise ValueError(f"the CUDA kernel of MLA decode cannot take this: {missing}")
    return missing is None


def _launch_triton(
    q_latent_BTHR: Tensor, q_rope_BTHD: Tensor, cache_PGW: Tensor, table_BP: Tensor, position_BT: Tensor, scale: float,
    first_B: Tensor | None, out: Tensor, splits: int, block_m: int, config: Config,
) -> None:  # fmt: skip
    rows, tokens, heads, rank = q_latent_BTHR.shape
    queries = tokens * heads
    rope, page_size, fp8 = q_rope_BTHD.shape[-1], cache_PGW.shape[1], cache_PGW.dtype == torch.uint8
    parts, lse = out, out
    if splits > 1:
        parts = torch.empty(rows, splits, queries, rank, dtype=torch.float32, device=out.device)
        lse = torch.empty(rows, splits, queries, dtype=torch.float32, device=out.device)
    tile = min(TILE, triton.next_power_of_2(max(rank, 16)))
    views = (
        (cache_PGW.view(t) for t in (torch.float8_e4m3fn, torch.float32, torch.bfloat16)) if fp8 else [cache_PGW] * 3
    )
    mla_kernels.decode[(-(-queries // block_m), rows, splits)](
        q_latent_BTHR, q_rope_BTHD, *views, table_BP, position_BT, position_BT if first_B is None else first_B,
        parts, lse, scale * math.log2(math.e), splits, tokens, heads, table_BP.stride(0), *q_latent_BTHR.stride()[:3],
        *q_rope_BTHD.stride()[:3], RANK=rank, ROPE=rope, WIDTH=cache_PGW.shape[2], PAGE=page_size, TILE=tile,
        TILES=triton.next_power_of_2(-(-rank // tile)), BLOCK_D=max(16, triton.next_power_of_2(rope)),
        BLOCK_M=block_m, BLOCK_N=config.block_n, SPLIT=splits > 1, FP8=fp8,
        FROM_FIRST=first_B is not None, EXACT=INTERPRETED, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        columns = min(TILE, triton.next_power_of_2(rank))
        mla_kernels.merge[(queries, rows, -(-rank // columns))](
            parts, lse, out, queries, splits, RANK=rank, BLOCK_S=triton.next_power_of_2(splits),
            BLOCK_C=columns, num_warps=4,
        )  # fmt: skip


def choose_splits(programs: int, tiles: int, places: int) -> int:
    """Into how many parts to cut each sequence's tiles, for `programs` programs a split and `places` at a time.

    The fewest that bring the last program's end, in tiles, to its least: rounds of programs times tiles of each, a
    program's start counted as two tiles, and a merge as one and its parts' traffic.
    """

    def cost(splits: int) -> float:
        alone = -(-programs * splits // places) * (-(-tiles // splits) + 2)
        return alone + (1 + splits * programs / places / 4 if splits > 1 else 0)

    return min(range(1, max(1, min(tiles, _MOST_SPLITS)) + 1), key=cost)


def _check(
    q_latent_BTHR: Tensor, q_rope_BTHD: Tensor, cache_PGW: Tensor, table_BP: Tensor, position_BT: Tensor,
    first_B: Tensor | None,
) -> None:  # fmt: skip
    rows, tokens, _, rank = q_latent_BTHR.shape
    rope = q_rope_BTHD.shape[-1]
    missing = cache_obstacle(rank, rope, cache_PGW.shape[1], cache_PGW.dtype, cache_PGW.device)
    if missing:
        raise ValueError(f"the MLA decode kernel cannot take this: {missing}")
    width = row_bytes(rank, rope) if cache_PGW.dtype == torch.uint8 else rank + rope
    if cache_PGW.shape[2] != width or not cache_PGW.is_contiguous():
        raise ValueError(f"cache is {tuple(cache_PGW.shape)}; expected contiguous rows of {width} ({cache_PGW.dtype})")
    for name, query in (("q_latent", q_latent_BTHR), ("q_rope", q_rope_BTHD)):
        if query.dtype != torch.bfloat16 or query.shape[:3] != q_latent_BTHR.shape[:3] or query.stride(-1) != 1:
            raise ValueError(
                f"{name} is {tuple(query.shape)} of {query.dtype}; expected (B, T, H, size) of bfloat16 with the last "
                "dimension dense, the same B, T, H for both"
            )
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "table": (table_BP, (rows, table_BP.shape[-1])),
        "position": (position_BT, (rows, tokens)),
    }
    if first_B is not None:
        expected["first"] = first_B, (rows,)
    for name, (indices, shape) in expected.items():
        dense = indices.stride(-1) == 1 if name == "table" else indices.is_contiguous()
        if indices.shape != shape or indices.dtype not in (torch.int32, torch.int64) or not dense:
            raise ValueError(
                f"{name} is {tuple(indices.shape)} of {indices.dtype}; expected {shape} of int32 or int64, dense"
            )
    same_device(cache=cache_PGW, q_latent=q_latent_BTHR, q_rope=q_rope_BTHD, table=table_BP, position=position_BT)


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

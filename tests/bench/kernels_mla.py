"""MLA decode and the FP8 cache's append, for tests.bench.kernels.

"ours" is the path that is taken by itself; where that is the CUDA kernel, Triton's stands beside it ("ours, Triton").
Beside our rows: the same attention over keys and values rebuilt for every head, by torch's SDPA, which is what the
latent saves; FlashMLA and FlashInfer where they can be imported. bytes is one reading of the cache, the queries and
the output; flops those of the absorbed form. What binds a row is in its note: 16 heads bytes, 128 heads the BF16 rate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.kernels_timing import Bench, Check, Row

RANK, ROPE, PAGE, SCALE = 512, 64, 64, 192**-0.5
_SDPA_BYTES = 24 * 2**30  # of rebuilt keys and values; beyond, no row


def checks(bench: Bench) -> Iterator[Check]:
    from teacher.kernels.mla_append import append
    from teacher.kernels.mla_cache import pack
    from tests.teacher.kernels.mla_cases import Case, error

    lengths = [1, 63, 64, 65, 577, 1088, 5000]
    for fp8 in (False, True):
        for heads, tokens in ((16, 1), (16, 2), (16, 5), (128, 1), (128, 2)):
            case = Case(lengths, heads, tokens, fp8=fp8)
            name = f"mla decode {'fp8' if fp8 else 'bf16'} {heads} heads, {tokens} tokens"
            for path in _paths(fp8, heads * tokens):
                for splits in (1, 7, None):
                    found = error(case.run(splits=splits, path=path), case.reference())
                    yield Check(f"{name}, {splits or 'own'} splits, {path}", found, 6e-3)
    for heads in (16, 64):
        case = Case([3000, 700], heads, fp8=True)
        floor, truth = error(case.reference(), case.truth()), case.truth()
        for path in _paths(True, heads):
            name = f"mla decode fp8 {heads} heads against unrounded truth, {path}"
            yield Check(name, error(case.run(path=path), truth), 1.2 * floor)
    latent = torch.randn(1000, RANK + ROPE, device="cuda", dtype=torch.bfloat16) * 3
    cache = torch.full((20, PAGE, 656), 0xA5, dtype=torch.uint8, device="cuda")
    place = torch.randperm(19 * PAGE, device="cuda")[:1000] + PAGE
    append(cache, place, latent, RANK)
    yield Check("mla append, bytes that differ", float((cache.flatten(0, 1)[place] != pack(latent, RANK)).sum()), 0.0)


def rows(bench: Bench) -> Iterator[Row]:
    yield from _appends(bench)
    contexts = (4096, 32768) if bench.quick else (4096, 8192, 16384, 32768)
    batches = (1, 32, 128) if bench.quick else (1, 8, 32, 64, 128)
    for context in contexts:
        for batch in batches:
            yield from _decodes(bench, batch, context)


def _decodes(bench: Bench, batch: int, context: int) -> Iterator[Row]:
    from teacher.kernels.mla_decode import mla_decode

    sets = [_caches(batch, context) for _ in range(2)]
    for heads in (16, 128):
        queries = [torch.randn(batch, 1, heads, RANK + ROPE, device="cuda").bfloat16() for _ in sets]
        flops = 2 * batch * heads * context * (2 * RANK + ROPE)
        other = batch * heads * 2 * (2 * RANK + ROPE)
        position = torch.full((batch, 1), context - 1, device="cuda")
        shape = f"b{batch} h{heads} s{context}"
        for which, name, width in ((0, "bf16", 1152), (1, "fp8", 656)):
            size = batch * context * width + other
            paths = _paths(which == 1, heads, batch * context)
            for path in paths:
                makes = [
                    _bound(
                        partial(mla_decode, path=path), query[..., :RANK], query[..., RANK:], caches[which], caches[2],
                        position, SCALE,
                    )
                    for query, caches in zip(queries, sets, strict=True)
                ]  # fmt: skip
                by = "ours, Triton" if path == "triton" and len(paths) > 1 else "ours"
                yield bench.measure("mla decode", f"{shape} {name}", by, flops, size, makes)
        size = batch * context * 1152 + other
        for peer, make in _peers(batch, heads, context):
            makes = [make(query, caches[0], caches[2]) for query, caches in zip(queries, sets, strict=True)]
            yield bench.measure("mla decode", f"{shape} bf16", peer, flops, size, makes)
        if context == 4096 and batch * heads * context * 320 * 2 <= _SDPA_BYTES:
            yield bench.measure(
                "mla decode", f"{shape} bf16", "SDPA, rebuilt", flops, size, [_sdpa(batch, heads, context)]
            )


def _paths(fp8: bool, queries: int, keys: int | None = None) -> tuple[str, ...]:
    """What is taken by itself for so many keys in all (None: for many), and Triton's kernel beside the CUDA one."""
    from teacher.kernels.cuda.build import library
    from teacher.kernels.mla_hopper import preferred

    tiles = 10**6 if keys is None else keys // PAGE
    by_cuda = preferred(fp8, queries, tiles) and not isinstance(library("mla_decode"), str)
    return ("cuda", "triton") if by_cuda else ("triton",)


def _caches(batch: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """A bf16 cache, an FP8 one, and the pages of each sequence, shuffled."""
    from teacher.kernels.mla_cache import pack

    pages = batch * context // PAGE
    plain = torch.randn(pages + 1, PAGE, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    packed = torch.cat([pack(part, RANK) for part in plain.split(4096)])
    table = (torch.randperm(pages, device="cuda", dtype=torch.int32) + 1).view(batch, -1)
    return plain, packed, table


def _appends(bench: Bench) -> Iterator[Row]:
    from teacher.kernels.mla_append import append
    from teacher.kernels.mla_cache import pack

    for tokens in (128, 65536):
        latents = [torch.randn(tokens, RANK + ROPE, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        cache = torch.zeros(tokens // PAGE + 2, PAGE, 656, dtype=torch.uint8, device="cuda")
        place = torch.randperm(tokens, device="cuda") + PAGE
        size, shape = tokens * (1152 + 656 + 8), f"{tokens} tokens"
        ours = [_bound(append, cache, place, latent, RANK) for latent in latents]
        yield bench.measure("mla append", shape, "ours", 0, size, ours)

        def in_torch(latent: Tensor, cache: Tensor = cache, place: Tensor = place) -> None:
            cache.flatten(0, 1)[place] = pack(latent, RANK)

        yield bench.measure("mla append", shape, "torch", 0, size, [_bound(in_torch, latent) for latent in latents])


def _bound(work: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: work(*arguments)


def _sdpa(batch: int, heads: int, context: int) -> Callable[[], Tensor]:
    """192 + 128 values a head a token, as kv_b_proj rebuilds them; the rebuilding itself is not counted."""
    query = torch.randn(batch, heads, 1, 192, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(batch, heads, context, 192, device="cuda", dtype=torch.bfloat16)
    value = torch.randn(batch, heads, context, 128, device="cuda", dtype=torch.bfloat16)
    return lambda: F.scaled_dot_product_attention(query, key, value)


def _peers(batch: int, heads: int, context: int) -> Iterator[tuple[str, Callable[..., Callable[[], Any]]]]:
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    if importlib.util.find_spec("flash_mla"):
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata

        def flash_mla(query: Tensor, cache: Tensor, table: Tensor) -> Callable[[], Any]:
            schedule, splits = get_mla_metadata(lengths, heads, 1)
            return lambda: flash_mla_with_kvcache(
                query, cache.unsqueeze(2), table, lengths, RANK, schedule, splits, softmax_scale=SCALE, causal=True
            )

        yield "FlashMLA", flash_mla
    if importlib.util.find_spec("flashinfer"):
        import flashinfer

        def flash_infer(query: Tensor, cache: Tensor, table: Tensor) -> Callable[[], Any]:
            work = torch.empty(2**27, dtype=torch.int8, device="cuda")
            wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(work)
            starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
            wrapper.plan(
                starts, starts * (context // PAGE), table.flatten(), lengths, heads, RANK, ROPE, PAGE, True, SCALE,
                torch.bfloat16, torch.bfloat16,
            )  # fmt: skip
            q_latent, q_rope = query.squeeze(1).split((RANK, ROPE), dim=-1)
            latent, rope = cache.split((RANK, ROPE), dim=-1)
            return lambda: wrapper.run(q_latent, q_rope, latent, rope)

        yield "FlashInfer", flash_infer

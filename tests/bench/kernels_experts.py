"""Quantisation, the grouped FP8 products and the expert layer at R1's sizes, for tests.bench.kernels.

Shapes of the products are DeepGEMM's published ones; a floor of bytes counts each operand once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from teacher.experts import grouped_experts
from teacher.fp8 import ACTIVATION_BLOCK, FP8, WEIGHT_BLOCK, dequantize, quantize
from teacher.fused import MOST_PAIRED
from teacher.kernels.expert_layer import expert_layer
from teacher.kernels.expert_pairs import expert_pairs
from teacher.kernels.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_reference,
    grouped_swiglu,
    grouped_swiglu_reference,
)
from teacher.kernels.operands import Fp8, Groups
from teacher.kernels.quantize import (
    quantize_activations,
    quantize_activations_both_ways,
    quantize_activations_transposed,
    quantize_weights,
    quantize_weights_both_ways,
    requantize_transposed,
)
from teacher.quantized_experts import expert_layer_reference
from tests.bench import kernels_operands as draw
from tests.bench.kernels_operands import EXPERTS, HIDDEN, INNER, TOP_K, contiguous, routing, stack, visited
from tests.bench.kernels_peers import dense, grouped, layer
from tests.bench.kernels_timing import Bench, Check, Row

GATE_UP, DOWN = (2 * INNER, HIDDEN), (HIDDEN, INNER)  # N and K
EXPERT_BYTES = 3 * HIDDEN * INNER


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """mean|found - expected| / mean|expected|; a reference of zeros is refused."""
    assert expected.float().abs().mean() > 0
    return float((found.float() - expected.float()).abs().mean() / expected.float().abs().mean())


def checks(bench: Bench) -> Iterator[Check]:
    x = torch.randn(1088, 577 * 16, device="cuda", dtype=torch.bfloat16) * torch.rand(1088, 1, device="cuda").exp2()
    along, along_t = quantize(x, ACTIVATION_BLOCK), quantize(x.t(), ACTIVATION_BLOCK)
    blocks, blocks_t = quantize(x, WEIGHT_BLOCK), quantize(x.t(), WEIGHT_BLOCK)
    back = dequantize(*along, torch.float32, ACTIVATION_BLOCK)
    both, weights_both = quantize_activations_both_ways(x), quantize_weights_both_ways(x)
    for name, found, expected in (
        ("activations", quantize_activations(x), along),
        ("activations transposed", quantize_activations_transposed(x), along_t),
        ("activations both ways", both[0], along),
        ("activations both ways, transposed", both[1], along_t),
        ("activations anew, transposed", requantize_transposed(*along), quantize(back.t(), ACTIVATION_BLOCK)),
        ("weights", quantize_weights(x), blocks),
        ("weights transposed", quantize_weights(x, transposed=True), blocks_t),
        ("weights both ways", weights_both[0], blocks),
        ("weights both ways, transposed", weights_both[1], blocks_t),
    ):
        codes = (found[0].contiguous().view(torch.uint8) != expected[0].contiguous().view(torch.uint8)).sum()
        yield Check(f"quantise {name}: values that differ", float(codes + (found[1] != expected[1]).sum()), 0)
    for counts, starts in (
        ([577, 0, 1, 1088], None),
        ([1, 0, 3, 2, 0, 9], None),
        ([1000, 0, 37, 1], [0, 1024, 2048, 3072]),
    ):
        yield from _products(counts, starts)
    for calls, tokens, experts in ((1, 1, 16), (32, 1, 16), (1, 77, 16), (1, 1500, 8)):
        gate_up, down = stack(experts + 1, *GATE_UP), stack(experts + 1, *DOWN)
        x = torch.randn(calls * tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        indices, weights = routing(calls * tokens, experts, 4)
        found = torch.cat(
            [
                expert_layer(*call, gate_up, down, shared=True)
                for call in zip(x.split(tokens), indices.split(tokens), weights.split(tokens), strict=True)
            ]
        )
        expected = expert_layer_reference(x, indices, weights, gate_up, down, shared=True)
        # Hidden values between two codes of e4m3 are decided by the last bits of the first product: a step of 6% each.
        # One token alone has so few of them that chance may decide: 32 calls together say whether it did.
        name = f"expert layer, {tokens} tokens" + (f", {calls} calls" if calls > 1 else "")
        yield Check(name, relative(found, expected.bfloat16()), 5e-3)
        if tokens <= MOST_PAIRED and calls > 1:
            found = torch.cat(
                [
                    expert_pairs(Fp8(*quantize_activations(a)), b, c, gate_up, down, shared=1).sum(0)
                    for a, b, c in zip(x.split(tokens), indices.split(tokens), weights.split(tokens), strict=True)
                ]
            )
            yield Check(name.replace("expert layer", "experts pair by pair"), relative(found, expected), 5e-3)


def _products(counts: list[int], starts: list[int] | None) -> Iterator[Check]:
    """Both products on rows that lie so; what belongs to no expert is NaN before and after."""
    groups = contiguous(counts)
    total = sum(counts)
    if starts is not None:
        groups = Groups(torch.tensor(starts, dtype=torch.int32, device="cuda"), groups.count_E)
        total = starts[-1] + 1024
    member = torch.zeros(total, dtype=torch.bool, device="cuda")
    for start, count in zip(groups.start_E.tolist(), counts, strict=True):
        member[start : start + count] = True
    x, w = draw.rows(total, HIDDEN), stack(len(counts), *GATE_UP)
    x.scales[~member] = float("nan")
    layout = "contiguous" if starts is None else "masked"
    out = torch.full((total, GATE_UP[0]), float("nan"), dtype=torch.float32, device="cuda")
    found, expected = grouped_gemm(x, w, groups, out), grouped_gemm_reference(x, w, groups)
    yield Check(f"grouped product, {layout} {counts}", relative(found[member], expected[member]), 1e-3)
    yield Check(f"  rows written that are no expert's, {layout}", float((~found[~member].isnan()).sum()), 0)
    values = torch.full((total, INNER), 0x7F, dtype=torch.uint8, device="cuda").view(FP8)
    scales = torch.full((INNER // 128, -(-total // 4) * 4), float("nan"), device="cuda")[:, :total].t()
    hidden, wanted = grouped_swiglu(x, w, groups, Fp8(values, scales)), grouped_swiglu_reference(x, w, groups)
    back, truth = (dequantize(v, s.contiguous(), torch.float32, ACTIVATION_BLOCK) for v, s in (hidden, wanted))
    yield Check(f"SwiGLU product, {layout} {counts}", relative(back[member], truth[member]), 1e-3)


def rows_of_casts(bench: Bench) -> Iterator[Row]:
    """And a copy of as many bytes, which pays as they do for its start and for the lines that the flush left."""
    count = 16384
    sets = [torch.randn(count, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    eight = [quantize_activations(x) for x in sets]
    one, scales = count * HIDDEN, count * HIDDEN // 32  # a byte a value; a scale of 4 for 128 of them
    casts: list[tuple[str, int, list[Callable[[], Any]]]] = [
        ("activations", 3 * one + scales, [lambda x=x: quantize_activations(x) for x in sets]),
        ("activations transposed", 3 * one + scales, [lambda x=x: quantize_activations_transposed(x) for x in sets]),
        ("activations both ways", 4 * one + 2 * scales, [lambda x=x: quantize_activations_both_ways(x) for x in sets]),
        ("activations anew, transposed", 2 * (one + scales), [lambda x=x: requantize_transposed(*x) for x in eight]),
        ("weights", 3 * one, [lambda x=x: quantize_weights(x) for x in sets]),
        ("weights transposed", 3 * one, [lambda x=x: quantize_weights(x, transposed=True) for x in sets]),
        ("weights both ways", 4 * one, [lambda x=x: quantize_weights_both_ways(x) for x in sets]),
    ]
    for name, moved, runs in casts:
        yield bench.measure(f"quantise {name}", f"{count} x {HIDDEN}", "ours", 0, moved, runs)
    halves = [torch.randn(3 * one // 8, device="cuda") for _ in range(2)]
    outs = [torch.empty_like(x) for x in halves]
    runs = [lambda x=x, out=out: torch.neg(x, out=out) for x, out in zip(halves, outs, strict=True)]
    yield bench.measure("quantise: a copy of as many bytes", f"{count} x {HIDDEN}", "torch.neg", 0, 3 * one, runs)


def rows_of_products(bench: Bench) -> Iterator[Row]:
    for (n, k), (experts, each) in (
        (shape, size) for shape in (GATE_UP, DOWN) for size in ((4, 8192), (8, 4096), (1, 1024), (2, 512), (4, 256))
    ):
        total, groups, w = experts * each, contiguous([each] * experts), stack(experts, n, k)
        sets = [draw.rows(total, k) for _ in range(2)]
        kind = "contiguous" if each > 1024 else "masked"
        shape = f"{experts} x {each}, N {n} K {k}"
        flops, moved = 2 * total * n * k, experts * n * k + total * (k + 2 * n)
        if kind == "masked":  # each expert's rows in a buffer of 4096 a expert, as a decode step has them
            groups = Groups(groups.start_E // each * 4096, groups.count_E)
            sets = [draw.rows(4096 * experts, k) for _ in range(2)]
        runs = [lambda x=x, w=w, groups=groups: grouped_gemm(x, w, groups) for x in sets]  # type: ignore[misc]
        yield bench.measure(f"grouped, {kind}", shape, "ours", flops, moved, runs)
        if kind == "contiguous" and not (bench.quick and experts == 8):
            for name, run in grouped(sets[0], w, groups):
                yield bench.measure(f"grouped, {kind}", shape, name, flops, moved, [run])
            if experts == 8:
                one = Fp8(w.values[:1], w.scales[:1])
                for name, run in dense(sets[0], one):
                    yield bench.measure(
                        "one matrix", shape.replace("8 x 4096", "32768 rows"), name, flops, moved, [run]
                    )
    n, k = GATE_UP
    w, sets, groups = stack(8, n, k), [draw.rows(32768, k) for _ in range(2)], contiguous([4096] * 8)
    runs = [lambda x=x: grouped_swiglu(x, w, groups) for x in sets]  # type: ignore[misc]
    moved = 8 * n * k + 32768 * (k + n // 2)
    yield bench.measure("grouped SwiGLU", "8 x 4096, N 2 x 2048 K 7168", "ours", 2 * 32768 * n * k, moved, runs)


def rows_of_layer(bench: Bench) -> Iterator[Row]:
    """The routed experts and the shared one: bytes of the experts visited, activations in and out."""
    gate_up, down = stack(EXPERTS + 1, *GATE_UP), stack(EXPERTS + 1, *DOWN)
    routed = Fp8(gate_up.values[:-1], gate_up.scales[:-1]), Fp8(down.values[:-1], down.scales[:-1])
    sizes = (1, 16, 128, 512, 8192) if bench.quick else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192, 32768)
    for tokens in sizes:
        sets = [(torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16), *routing(tokens)) for _ in range(2)]
        reached = sum(visited(indices) for _, indices, _ in sets) / len(sets)
        kernel = "expert layer decode" if tokens <= 512 else "expert layer prefill"
        for shared in (False, True):
            flops = 6 * tokens * (TOP_K + shared) * HIDDEN * INNER
            moved = (reached + shared) * EXPERT_BYTES + 4 * tokens * HIDDEN
            weights = (gate_up, down) if shared else routed
            runs = [
                lambda each=each, weights=weights, shared=shared: expert_layer(*each, *weights, shared=shared)  # type: ignore[misc]
                for each in sets
            ]
            shape = f"{tokens} tokens{' + shared expert' if shared else ''}"
            if tokens <= MOST_PAIRED:  # as a step's layer runs them: from FP8 of the norm before to parts for the next
                eights = [(Fp8(*quantize_activations(x)), *route) for x, *route in sets]
                pairs = [
                    lambda each=each, weights=weights, shared=shared: expert_pairs(*each, *weights, shared=int(shared))  # type: ignore[misc]
                    for each in eights
                ]
                yield bench.measure(kernel, shape, "ours", flops, moved, pairs)
            sorted_by = "ours, sorted" if tokens <= MOST_PAIRED else "ours"
            yield bench.measure(kernel, shape, sorted_by, flops, moved, runs)
        flops, moved = 6 * tokens * TOP_K * HIDDEN * INNER, reached * EXPERT_BYTES + 4 * tokens * HIDDEN
        for name, run in layer(*sets[0], *routed):
            yield bench.measure(kernel, f"{tokens} tokens", name, flops, moved, [run])
    del gate_up, down, routed
    if not bench.quick:
        yield from _model_in_bf16(bench)


def _model_in_bf16(bench: Bench) -> Iterator[Row]:
    """What the model does without FP8, at twice the bytes: its floor is its own."""
    wide = torch.randn(EXPERTS, 2 * INNER, HIDDEN, device="cuda", dtype=torch.bfloat16).mul_(HIDDEN**-0.5)
    down = torch.randn(EXPERTS, HIDDEN, INNER, device="cuda", dtype=torch.bfloat16).mul_(INNER**-0.5)
    for tokens in (1, 16, 128, 512, 8192):
        x, (indices, weights) = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16), routing(tokens)
        run = lambda x=x, i=indices, w=weights: grouped_experts(x, i, w, wide, down)  # type: ignore[misc]  # noqa: E731
        moved = visited(indices) * 2 * EXPERT_BYTES + 4 * tokens * HIDDEN
        kernel = "expert layer decode" if tokens <= 512 else "expert layer prefill"
        flops = 6 * tokens * TOP_K * HIDDEN * INNER
        yield bench.measure(kernel, f"{tokens} tokens", "the model's, bf16 grouped_mm", flops, moved, [run])


def rows(bench: Bench) -> Iterator[Row]:
    yield from rows_of_casts(bench)
    yield from rows_of_products(bench)
    yield from rows_of_layer(bench)

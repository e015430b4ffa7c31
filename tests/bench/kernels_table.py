"""The figures of tests.bench.kernels as Markdown: python -m tests.bench.kernels_table kernels.json"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

Rows = dict[tuple[str, str, str], dict[str, Any]]  # by kernel, shape and who
PRODUCTS = {
    "torch._scaled_grouped_mm row-wise": "torch, row-wise scales",
    "torch._grouped_mm bf16": "torch, bf16",
}
MATRICES = {
    "FlashInfer (DeepGEMM of TensorRT-LLM) 1x128, 128x128": "DeepGEMM, as FlashInfer 0.6.4 has it (TensorRT-LLM's)",
    "torch._scaled_mm 1x128, 128x128": "cuBLAS, 1 × 128 by 128 × 128 scales",
    "torch._scaled_mm row-wise": "cuBLAS, row-wise scales, sums in fp32",
    "torch._scaled_mm row-wise fast": "the same, sums left in the tensor cores",
}
BATCHES, CONTEXTS = (1, 8, 32, 128), (4096, 32768)  # of 5 and 4 that are measured


def table(head: list[str], lines: list[list[str]]) -> None:
    print("\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n")


def us(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['seconds'] * 1e6:,.{1 if row['seconds'] < 1e-4 else 0}f}"


def spread(row: dict[str, Any]) -> str:
    return f"{(row['high'] - row['low']) / row['seconds']:.0%}"


def casts(rows: Rows, copy: float) -> None:
    print("Casts of 16384 × 7168:\n")
    found = [row for (kernel, *_), row in rows.items() if kernel.startswith("quantise")]
    lines = [
        [row["kernel"].removeprefix("quantise").strip(": "), us(row), spread(row), f"{row['tb_per_s']:.2f}",
         f"**{row['tb_per_s'] / copy:.1%}**"]
        for row in found
    ]  # fmt: skip
    table(["cast", "μs", "between quartiles", "TB/s", "of copy"], lines)


def products(rows: Rows) -> None:
    print("Grouped product, bf16 out, TFLOP/s:\n")
    lines = []
    for (kernel, shape, by), row in rows.items():
        if kernel.startswith("grouped") and by == "ours":
            peers = [rows.get((kernel, shape, peer)) for peer in PRODUCTS]
            told = ["" if peer is None else f"{peer['tflops']:,.0f}" for peer in peers]
            name = kernel.removeprefix("grouped").strip(", ").replace("contiguous", "")
            lines.append([f"{name} {shape}".strip(), f"**{row['tflops']:,.0f}**", spread(row), *told])
    table(["rows, N, K", "ours", "between quartiles", *PRODUCTS.values()], lines)
    print("One matrix of 32,768 rows instead of groups, TFLOP/s:\n")
    shapes = list(dict.fromkeys(shape for kernel, shape, _ in rows if kernel == "one matrix"))
    lines = [[name, *(_rate(rows.get(("one matrix", shape, by))) for shape in shapes)] for by, name in MATRICES.items()]
    table(["", *(shape.split(", ")[1] for shape in shapes)], lines)


def _rate(row: dict[str, Any] | None) -> str:
    return "" if row is None or row["seconds"] != row["seconds"] else f"{row['tflops']:,.0f}"


def layer(rows: Rows, copy: float) -> None:
    print("The expert layer:\n")
    lines = []
    for (kernel, shape, by), row in rows.items():
        if kernel.startswith("expert layer") and by == "ours" and "shared" not in shape:
            shared = rows[kernel, shape + " + shared expert", by]
            model = rows.get((kernel, shape, "the model's, bf16 grouped_mm"))
            rate = [f"{r['tb_per_s']:.2f} TB/s, {r['tb_per_s'] / copy:.0%}" for r in (row, shared)]
            if kernel.endswith("prefill"):
                rate = [f"{r['tflops']:,.0f} TFLOP/s" for r in (row, shared)]
            lines.append([shape.split()[0], us(row), rate[0], us(shared), rate[1], us(model)])
    table(["tokens", "μs", "of copy", "with the shared expert, μs", "of copy", "the model's, bf16, μs"], lines)


def attention(rows: Rows, copy: float) -> None:
    print("MLA decode, a token a sequence, μs:\n")
    lines = []
    for (kernel, shape, by), row in rows.items():
        if kernel != "mla decode" or by != "ours":
            continue
        match = re.fullmatch(r"b(\d+) h(\d+) s(\d+) (\w+)", shape)
        assert match is not None, shape
        batch, heads, context, cache = match.groups()
        if int(batch) not in BATCHES or int(context) not in CONTEXTS:
            continue
        bound = f"{row['tb_per_s'] / copy:.0%} of copy" if heads == "16" else f"{row['tflops']:,.0f} TFLOP/s"
        others = [rows.get((kernel, shape, peer)) for peer in ("ours, Triton", "FlashInfer", "SDPA, rebuilt")]
        line = [heads, batch, f"{int(context):,}", cache.replace("fp8", "FP8"), f"**{us(row)}**", bound]
        lines.append([*line, *map(us, others)])
    lines.sort(key=lambda line: (int(line[0]), line[3] == "FP8", len(line[2]), int(line[1])))
    table(["heads", "batch", "context", "cache", "ours", "", "Triton", "FlashInfer", "SDPA, rebuilt"], lines)


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    at, limits = found["about"], found["ceilings"]
    rows = {(row["kernel"], row["shape"], row["by"]): row for row in found["rows"]}
    copy = limits["copy_tb_per_s"]
    print(f"{at['gpu']}, driver {at['driver']}, torch {at['torch']}, triton {at['triton']}, commit {at['commit']},")
    print(f"`{at['command']}`; copy {copy:.2f} TB/s (read plus written), bf16 product {limits['bf16_tflops']:.0f}")
    passed = sum(check["error"] <= check["bound"] for check in found["checks"])
    print(f"TFLOP/s, both of the same run. {passed} of {len(found['checks'])} checks passed.\n")
    casts(rows, copy)
    products(rows)
    layer(rows, copy)
    attention(rows, copy)


if __name__ == "__main__":
    main()

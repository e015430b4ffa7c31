"""The figures of tests.bench.r1_layer as Markdown: python -m tests.bench.r1_layer_table r1_layer.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PARTS = ("attention", "norms", "router", "experts", "dense")


def cell(row: dict[str, Any], name: str) -> str:
    us, floor = row["us"].get(name), row["floor_us"][name]
    return "" if us is None else f"{us:,.0f} ({floor / us:.0%})"


def table(rows: list[dict[str, Any]], first: str) -> list[str]:
    """A row a measurement: microseconds, and which share of them the floor is."""
    names = ("moe layer", *PARTS[:-1], "dense layer", "dense")
    lines = [f"| {first} | " + " | ".join(names) + " | 8 GPUs: a MoE layer | a step of 61, ms | tokens/s |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for row in rows:
        ahead = row["eight_gpus"] or {"moe_layer_us": 0, "step_ms": 0, "tokens_per_second": 0}
        what = f"{row['rows']} at {row['context']:,}" if row["new"] == 1 else f"{row['new']:,}"
        cells = [cell(row, name) for name in names]
        seen = [f"{ahead['moe_layer_us']:,.0f}", f"{ahead['step_ms']:.1f}", f"{ahead['tokens_per_second']:,}"]
        lines.append("| " + " | ".join([what, *cells, *seen]) + " |")
    return lines


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    at, limits = found["about"], found["ceilings"]
    print(f"{at['gpu']}, driver {at['driver']}, torch {at['torch']}, triton {at['triton']}, commit {at['commit']},")
    print(f"`{at['command']}`; copy {limits['copy_tb_per_s']} TB/s,")
    print(f"bf16 product {limits['bf16_tflops']} TFLOP/s, both of the same run.\n")
    for kind, first in (("decode", "sequences"), ("prefill", "tokens")):
        if found[kind]:
            print("\n".join([f"{kind}:\n", *table(found[kind], first), ""]))
    plain = [row for row in found["decode"] if row["us"].get("moe layer, not fused")]
    for row in plain:
        us = row["us"]
        print(
            f"{row['rows']} at {row['context']}: by operators of torch {us['moe layer, not fused']:,.0f} us, fused "
            f"{us['moe layer']:,.0f}; results differ by {row['fused_error']:.1%}"
        )


if __name__ == "__main__":
    main()

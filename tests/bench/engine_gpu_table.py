"""The figures of tests.bench.engine_gpu as Markdown: python -m tests.bench.engine_gpu_table engine_gpu.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WORDS = {
    ("speculate", 1): "draft module, 1 a step",
    ("speculate", 4): "MTP, 4 drafted a step",
    ("fused", False): "without the fused kernels",
    ("graphs", False): "without CUDA graphs",
    ("cache_dtype", "fp8"): "cache in FP8",
    ("cache_dtype", "model"): "cache in bf16",
}


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    at = found["about"]
    print(f"{at['gpu']}, driver {at['driver']}, torch {at['torch']}, triton {at['triton']}, commit {at['commit']},")
    print(f"`{at['command']}`; new tokens a second of the whole call, the best of its rounds:\n")
    counts = sorted({row["concurrency"] for row in found["rows"]})
    lines: dict[str, dict[int, str]] = {}
    for row in found["rows"]:
        if "left_out" in row:
            continue
        how = [word for (name, value), word in WORDS.items() if name in row and row[name] == value]
        told = f"{row['tokens_per_second']:,}"
        if row["accepted"] is not None:
            told += f" ({row['accepted']:.0%} accepted"
            told += f", {row['same']:.0%} the same text)" if "same" in row else ")"
        lines.setdefault(", ".join([row["model"], *how]), {})[row["concurrency"]] = told
    print("| in flight | " + " | ".join(map(str, counts)) + " |")
    print("|---" * (len(counts) + 1) + "|")
    for name, told_by in lines.items():
        print(f"| {name} | " + " | ".join(told_by.get(count, "") for count in counts) + " |")
    if left := sum("left_out" in row for row in found["rows"]):
        print(f"\nLeft out for time: {left} rows.")


if __name__ == "__main__":
    main()

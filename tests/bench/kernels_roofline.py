"""The rows of tests.bench.kernels as a roofline: FLOP a byte against FLOP a second, under the ceilings of the same run.

python -m tests.bench.kernels_roofline kernels.json kernels.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.bench.kernels_timing import FP8_PEAK

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def draw(found: dict[str, Any], path: Path) -> None:
    """Our rows filled, peers' hollow; casts and copies, which do no FLOP, are not drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    copy, bf16 = found["ceilings"]["copy_tb_per_s"] * 1e12, found["ceilings"]["bf16_tflops"] * 1e12
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    grid = [10 ** (exponent / 20) for exponent in range(90)]
    axes.plot(grid, [min(x * copy, FP8_PEAK) / 1e12 for x in grid], "k-", lw=1, label="copy, FP8 peak (datasheet)")
    axes.plot(grid, [min(x * copy, bf16) / 1e12 for x in grid], "k--", lw=1, label="copy, bf16 product (measured)")
    rows = [row for row in found["rows"] if row["flops"] and row["seconds"]]
    for colour, kernel in zip(COLOURS * 3, dict.fromkeys(row["kernel"] for row in rows), strict=False):
        for ours in (True, False):
            mine = [row for row in rows if row["kernel"] == kernel and (row["by"] == "ours") == ours]
            axes.plot(
                [row["flops"] / row["bytes"] for row in mine], [row["tflops"] for row in mine], "o", color=colour,
                mfc=colour if ours else "none", label=kernel if ours else None, ms=5,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte (floors)", ylabel="TFLOP/s", ylim=(1, 3000), xlim=(1, 3e4))
    about = found["about"]
    axes.set_title(f"{about['gpu']}, driver {about['driver']}, {about['commit']}; hollow: peers", fontsize=9)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3, which="both", lw=0.3)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

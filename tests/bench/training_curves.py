"""Draw the curves of one or more training logs as a static SVG for the docs.

    python -m tests.bench.training_curves docs/tiny-r1.svg runs/teachers/tiny-r1/training_log.jsonl
    python -m tests.bench.training_curves docs/bases.svg runs/bases/*/training_log.jsonl

Panels, each drawn where the log has it: loss, held-out accuracy or right single steps, MaxVio.
"""

import json
import math
import sys
from pathlib import Path

COLOURS = ("#2563eb", "#d97706", "#059669")
WIDTH, HEIGHT, LEFT, TOP, GAP = 760, 150, 60, 26, 52
POINTS = 240  # a panel's width does not show more

Series = list[tuple[float, float]]


def panels(row: dict) -> dict[str, float]:
    """The figures that a line of the log holds, by panel."""
    found = {"loss (log scale)": row["loss"]}
    if "max_vio_mean" in row:
        found["MaxVio, mean over MoE layers"] = row["max_vio_mean"]
    if "accuracy" in row.get("eval", {}):
        found["held-out accuracy at temperature 0.6"] = row["eval"]["accuracy"]
    if "steps_right" in row:
        found["single steps right"] = row["steps_right"]
    return found


def read(path: Path) -> dict[str, Series]:
    series: dict[str, Series] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for name, value in panels(row).items():
            series.setdefault(name, []).append((row["tokens"] / 1e6, value))
    return {name: thin(points) for name, points in series.items()}


def thin(points: Series) -> Series:
    size = math.ceil(len(points) / POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def draw(runs: dict[str, dict[str, Series]]) -> str:
    names = list(dict.fromkeys(name for series in runs.values() for name in series))
    end = max(x for series in runs.values() for points in series.values() for x, _ in points)
    parts = []
    for number, name in enumerate(names):
        top = TOP + number * (HEIGHT + GAP)
        log = "log scale" in name
        values = [y for series in runs.values() for _, y in series.get(name, [])]
        low, high = (min(values), max(values)) if log else (0.0, max(1.0, *values) if "right" in name else max(values))

        def at(x: float, y: float, top: int = top, low: float = low, high: float = high, log: bool = log) -> str:
            share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
            return f"{LEFT + x / end * WIDTH:.1f},{top + HEIGHT * (1 - share):.1f}"

        parts.append(f'<text x="{LEFT}" y="{top - 8}" font-weight="600">{name}</text>')
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#cbd5e1"/>')
        for value, y in ((high, top + 10), (low, top + HEIGHT)):
            parts.append(f'<text x="{LEFT - 6}" y="{y}" text-anchor="end">{value:.3g}</text>')
        for colour, series in zip(COLOURS, runs.values(), strict=False):
            points = " ".join(at(x, y) for x, y in series.get(name, []))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    bottom = TOP + len(names) * (HEIGHT + GAP)
    parts.append(f'<text x="{LEFT + WIDTH}" y="{bottom - GAP + 18}" text-anchor="end">{end:.1f} million tokens</text>')
    for number, (colour, name) in enumerate(zip(COLOURS, runs, strict=False)):
        parts.append(f'<text x="{LEFT + 150 * number}" y="{bottom - GAP + 18}" fill="{colour}">{name}</text>')
    size = f'width="{LEFT + WIDTH + 20}" height="{bottom - 20}"'
    style = "font: 12px system-ui, sans-serif; background: white"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    out, *logs = map(Path, sys.argv[1:])
    out.write_text(draw({log.parent.name: read(log) for log in logs}))
    print(out)

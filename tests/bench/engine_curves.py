"""Draw first-token latency and tokens/s against the number of requests in flight, for the docs.

    python -m tests.bench.engine_curves docs/engine.svg engine.json [another.json ...]

Reads what `python -m tests.bench.engine --json FILE` wrote; several files are several lines.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea")
WIDTH, HEIGHT, LEFT, TOP, GAP = 760, 150, 60, 26, 58
PANELS = (
    ("tokens/s, all requests together", "tokens_per_second"),
    ("milliseconds to the first token, median", "first_token_ms_median"),
    ("milliseconds to the first token, 95% of requests", "first_token_ms_p95"),
)


def draw(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Both axes logarithmic: the load doubles from point to point."""
    loads = sorted({point["concurrency"] for points in runs.values() for point in points})
    end = max(1.0, math.log2(loads[-1]))
    parts = []
    for number, (name, key) in enumerate(PANELS):
        top = TOP + number * (HEIGHT + GAP)
        values = [point[key] for points in runs.values() for point in points]
        low, high = min(values), max(values)
        spread = math.log(high / low) or 1.0

        def at(
            load: float, value: float, top: int = top, low: float = low, spread: float = spread
        ) -> tuple[float, float]:
            return LEFT + math.log2(load) / end * WIDTH, top + HEIGHT * (1 - math.log(value / low) / spread)

        parts.append(f'<text x="{LEFT}" y="{top - 8}" font-weight="600">{name}</text>')
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#cbd5e1"/>')
        for value, base in ((high, top + 10), (low, top + HEIGHT)):
            parts.append(f'<text x="{LEFT - 6}" y="{base}" text-anchor="end">{plain(value)}</text>')
        for colour, points in zip(COLOURS, runs.values(), strict=False):
            places = [at(point["concurrency"], point[key]) for point in points]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            for (x, y), point in zip(places, points, strict=True):
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{point["concurrency"]} in flight: '
                    f"{point[key]:,.1f}</title></circle>"
                )
        for load in loads:
            x = LEFT + math.log2(load) / end * WIDTH
            parts.append(f'<text x="{x:.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">{load}</text>')
    bottom = TOP + len(PANELS) * (HEIGHT + GAP)
    parts.append(f'<text x="{LEFT + WIDTH}" y="{bottom - 22}" text-anchor="end">requests in flight</text>')
    for number, (colour, name) in enumerate(zip(COLOURS, runs, strict=False)):
        parts.append(f'<text x="{LEFT + 220 * number}" y="{bottom - 22}" fill="{colour}">{name}</text>')
    size = f'width="{LEFT + WIDTH + 20}" height="{bottom - 10}"'
    style = "font: 12px system-ui, sans-serif; background: white"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">{"".join(parts)}</svg>\n'


def plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def lines(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The curves of one run of the benchmark, by name."""
    return {name: measured["points"] for name, measured in found["concurrency"].items()}


if __name__ == "__main__":
    out, *files = map(Path, sys.argv[1:])
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for name, points in lines(json.loads(file.read_text())).items():
            runs[name if len(files) == 1 else f"{file.stem}, {name}"] = points
    out.write_text(draw(runs))
    print(out)

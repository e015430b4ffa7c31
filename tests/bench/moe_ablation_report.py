"""The tables and the curves of the DeepSeekMoE ablation, from its log.

    python -m tests.bench.moe_ablation_report                  # tables to the console, curves to docs/moe-ablation.svg
    python -m tests.bench.moe_ablation_report LOG SVG

Held-out loss is compared by seed: two arms of one seed have read the same examples in the same order. With three seeds
the range of the three differences is shown, and no interval is computed from them.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import mean

from tests.bench.moe_ablation import ARMS, LOG

COLOURS = ("#6b7280", "#d97706", "#2563eb", "#059669", "#dc2626")
WIDTH, HEIGHT, LEFT, TOP, GAP = 760, 190, 60, 26, 52
PAIRS = [("b", "a"), ("c", "a"), ("c", "b"), ("c", "d"), ("c", "e"), ("d", "e")]

Run = dict
Series = list[tuple[float, float]]


def read(log: Path) -> dict[str, list[Run]]:
    """The runs of each arm, by seed; arms without any are left out. ValueError if tokens or code differ."""
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    for name in ("tokens", "commit", "changes"):
        found = {(run["seed"] if name == "tokens" else 0, json.dumps(run[name])) for run in runs}
        if len(found) != len({seed for seed, _ in found}):
            raise ValueError(f"{log}: runs of one comparison differ in {name}: {sorted(found)}")
    arms = {arm: sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    return {arm: found for arm, found in arms.items() if found}


def held_out(run: Run, name: str) -> float:
    value = run["curve"][-1][name]
    return mean(value) if isinstance(value, list) else value


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    """mean [least, most]"""
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(
        *(scale * v for v in (mean(values), min(values), max(values))), d=digits
    )


def table(arms: dict[str, list[Run]]) -> str:
    lines = [
        "| | in experts | active | in routers | held-out loss | solved, % | MaxVio held out | MaxVio a step | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in arms.items():
        one = runs[0]
        lines.append(
            f"| {arm} | {one['expert_parameters']:,} | {one['active_expert_parameters']:,} "
            f"| {one['router_parameters']:,} | {spread([held_out(r, 'loss') for r in runs], 4)} "
            f"| {spread([held_out(r, 'solved') for r in runs], 1, 100)} "
            f"| {spread([held_out(r, 'max_vio') for r in runs], 2)} "
            f"| {spread([r['max_vio_mean_late'] for r in runs], 2)} | {mean(r['cpu_seconds'] for r in runs):.0f} |"
        )
    return "\n".join(lines)


def differences(arms: dict[str, list[Run]]) -> str:
    """Held-out loss by seed, one arm minus another; negative: the first is better."""
    by_letter = {arm[0]: {run["seed"]: run for run in runs} for arm, runs in arms.items()}
    lines = ["| | seed by seed | mean | same sign |", "|---|---|---|---|"]
    for one, other in PAIRS:
        if one not in by_letter or other not in by_letter:
            continue
        seeds = sorted(by_letter[one].keys() & by_letter[other].keys())
        found = [held_out(by_letter[one][s], "loss") - held_out(by_letter[other][s], "loss") for s in seeds]
        lower = sum(value < 0 for value in found)
        lines.append(
            f"| {one} - {other} | {', '.join(f'{value:+.4f}' for value in found)} | {mean(found):+.4f} "
            f"| {max(lower, len(found) - lower)} of {len(found)} |"
        )
    return "\n".join(lines)


def families(arms: dict[str, list[Run]]) -> str:
    names = list(next(iter(arms.values()))[0]["curve"][-1]["families"])
    lines = ["| solved, % | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm, runs in arms.items():
        means = [mean(run["curve"][-1]["families"][name] for run in runs) for name in names]
        lines.append(f"| {arm} | " + " | ".join(f"{100 * value:.0f}" for value in means) + " |")
    return "\n".join(lines)


def draw(arms: dict[str, list[Run]]) -> str:
    """Three panels over tokens; a line is the mean of an arm's seeds, the band behind it reaches from least to most."""
    figures = {"held-out loss (log scale)": "loss", "held-out problems solved": "solved", "MaxVio, held out": "max_vio"}
    end = max(point["tokens"] for runs in arms.values() for run in runs for point in run["curve"])
    parts = []
    for number, (title, name) in enumerate(figures.items()):
        top, log = TOP + number * (HEIGHT + GAP), "log" in title
        bands = {arm: _band(runs, name) for arm, runs in arms.items()}
        high = max(most for band in bands.values() for _, _, _, most in band)
        low = min(least for band in bands.values() for _, least, _, _ in band) if log else 0.0

        def at(x: float, y: float, top: int = top, low: float = low, high: float = high, log: bool = log) -> str:
            share = math.log(y / low) / math.log(high / low) if log else y / high
            return f"{LEFT + x / end * WIDTH:.1f},{top + HEIGHT * (1 - share):.1f}"

        parts.append(f'<text x="{LEFT}" y="{top - 8}" font-weight="600">{title}</text>')
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#cbd5e1"/>')
        for value, y in ((high, top + 10), (low, top + HEIGHT)):
            parts.append(f'<text x="{LEFT - 6}" y="{y}" text-anchor="end">{value:.3g}</text>')
        for arm, colour in zip(ARMS, COLOURS, strict=True):
            band = bands.get(arm, [])
            edge = [at(x, most) for x, _, _, most in band] + [at(x, least) for x, least, _, _ in reversed(band)]
            parts.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.12"/>')
            middle = " ".join(at(x, value) for x, _, value, _ in band)
            parts.append(f'<polyline points="{middle}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    bottom = TOP + len(figures) * (HEIGHT + GAP) - GAP + 18
    parts.append(f'<text x="{LEFT + WIDTH}" y="{bottom}" text-anchor="end">{end / 1e6:.2f} million tokens</text>')
    for number, (arm, colour) in enumerate(zip(ARMS, COLOURS, strict=True)):
        x, y = LEFT + 250 * (number % 3), bottom + 20 + 18 * (number // 3)
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{arm}</text>')
    size = f'width="{LEFT + WIDTH + 20}" height="{bottom + 48}"'
    style = "font: 12px system-ui, sans-serif; background: white"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">{"".join(parts)}</svg>\n'


def _band(runs: list[Run], name: str) -> list[tuple[float, float, float, float]]:
    """(tokens, least, mean, most) of the seeds; evaluations come after the same steps in every run."""
    band = []
    for points in zip(*(run["curve"] for run in runs), strict=True):
        values = [mean(p[name]) if isinstance(p[name], list) else p[name] for p in points]
        band.append((mean(p["tokens"] for p in points), min(values), mean(values), max(values)))
    return band


if __name__ == "__main__":
    log, out = map(Path, sys.argv[1:] or (LOG, LOG.with_suffix(".svg")))
    arms = read(log)
    print(table(arms), differences(arms), families(arms), sep="\n\n")
    out.write_text(draw(arms))

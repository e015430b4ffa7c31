"""Small charts as inline SVG.

Text stays in HTML and only marks are SVG, placed in percentages of a box as wide as the page gives it:
a chart scaled down as a whole would have unreadable labels on a phone. All colours come from the page's
style sheet through class names, so that light and dark need one drawing. The page's content security
policy forbids `style` attributes; none is used here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Model roles differ in shape as well as colour, so that they can be told apart in grey.
_MARKS = {
    "student": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
    "base": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "answers_only": "M-4-4H4V4H-4Z",
    "teacher": "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
}


@dataclass(frozen=True)
class Axis:
    """A linear scale from `low` to `high` with ticks inside it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> str:
        """Where `value` lies, as an SVG percentage; values outside are drawn at the edge."""
        share = (value - self.low) / (self.high - self.low)
        return f"{100 * min(1.0, max(0.0, share)):.2f}%"


UNIT = Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))


def nice_axis(values: Sequence[float], *, at_least: float, about: int = 5, tight: bool = False) -> Axis:
    """An axis that holds 0 and all `values`, at least `at_least` long, with ticks at 1, 2 or 5 times a power of ten.

    It ends on ticks, or with `tight` a little beyond the outermost values.
    """
    low, high = min([0.0, *values]), max([0.0, *values])
    if high - low < at_least:
        high = low + at_least
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 10) for i in range(first, last + 1))
    if not tight:
        return Axis(ticks[0], ticks[-1], ticks)
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin
    return Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high))


def _grid(axis: Axis, zero: bool) -> str:
    lines = []
    for tick in axis.ticks:
        name = "zero" if zero and tick == 0 else "grid"
        lines.append(f'<line class="{name}" x1="{axis.at(tick)}" x2="{axis.at(tick)}" y1="0" y2="100%"/>')
    return "".join(lines)


def mark(role: str) -> str:
    """The mark of a role alone, for a legend."""
    return f'<svg class="key {escape(role)}" viewBox="-7 -7 14 14" aria-hidden="true"><path d="{_MARKS[role]}"/></svg>'


def whisker(role: str, mean: float, interval: Sequence[float], axis: Axis, label: str, *, zero: bool = False) -> str:
    """One row of a dot-and-whisker plot: the mark at `mean` and a line over `interval`."""
    parts = [f'<svg class="plot-row {escape(role)}" role="img" aria-label="{escape(label)}">', _grid(axis, zero)]
    low, high = (axis.at(value) for value in interval)
    parts.append(f'<line class="whisker" x1="{low}" x2="{high}" y1="50%" y2="50%"/>')
    for end in (low, high):
        parts.append(f'<svg class="at" x="{end}" y="50%"><path class="cap" d="M0-8V8"/></svg>')
    parts.append(f'<svg class="at" x="{axis.at(mean)}" y="50%"><path class="mark" d="{_MARKS[role]}"/></svg></svg>')
    return "".join(parts)


def ticks(axis: Axis, labels: Sequence[str]) -> str:
    """The row of tick labels under whisker rows. Labels at the very edges stay inside the box."""
    parts = ['<svg class="ticks" aria-hidden="true">']
    for tick, label in zip(axis.ticks, labels, strict=True):
        anchor = "start" if tick == axis.low else "end" if tick == axis.high else "middle"
        parts.append(f'<text x="{axis.at(tick)}" y="12" text-anchor="{anchor}">{escape(label)}</text>')
    return "".join(parts) + "</svg>"


def bar(share: float, inner: float | None = None) -> str:
    """A horizontal bar of `share` of its box, with a darker part of length `inner`."""
    parts = [f'<svg class="bar" aria-hidden="true"><rect class="outer" width="{100 * share:.2f}%" height="100%"/>']
    if inner is not None:
        parts.append(f'<rect class="inner" width="{100 * inner:.2f}%" height="100%"/>')
    return "".join(parts) + "</svg>"


@dataclass(frozen=True)
class Line:
    """A series of a line chart; `name` becomes its class, points are (x, y) in data units."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def lines(series: Sequence[Line], x_high: float, y_axis: Axis, label: str) -> str:
    """Lines in a box that stretches to any size; strokes keep their width because they do not scale."""
    drawn = [f'<svg class="lines" role="img" aria-label="{escape(label)}">']
    for tick in y_axis.ticks:
        y = f"{100 - float(y_axis.at(tick)[:-1]):.2f}%"
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
    drawn.append('<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">')
    span = y_axis.high - y_axis.low
    for line in series:
        placed = [
            (1000 * x / x_high, 1000 - 1000 * min(1.0, max(0.0, (y - y_axis.low) / span))) for x, y in line.points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        drawn.append(f'<polyline class="{escape(line.name)}" points="{path}"/>')
        if line.dots:
            # A zero-length line with a round cap is a dot that stays round in a stretched box.
            dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in placed)
            drawn.append(f'<path class="dots {escape(line.name)}" d="{dots}"/>')
    return "".join(drawn) + "</svg></svg>"

"""Training curves: each model's training_log.jsonl, thinned to what a page can draw."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.jsonl import read_jsonl

# More points than this are averaged in neighbouring groups: a page is about this many pixels wide.
MOST_POINTS = 300

Points = list[tuple[float, float]]


@dataclass
class Curve:
    """One training run's log. All x values are tokens seen so far."""

    name: str  # "tiny-qwen" or "tiny-qwen/answers_only"
    loss: Points = field(default_factory=list)
    validation: Points = field(default_factory=list)
    lr: Points = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    tokens_per_second: float | None = None  # median over steps
    padding_fraction: float | None = None  # mean over steps
    averaged: int = 1  # steps behind each point of `loss`

    @property
    def final_loss(self) -> float | None:
        return self.loss[-1][1] if self.loss else None

    @property
    def best_validation(self) -> float | None:
        return min((y for _, y in self.validation), default=None)


def thin(points: Points, most: int = MOST_POINTS) -> tuple[Points, int]:
    """Means over groups of neighbours, at most `most` of them, and the group size. The last x stays."""
    size = -(-len(points) // most) if points else 1
    if size <= 1:
        return points, 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups], size


def _numbers(rows: list[dict[str, Any]], key: str) -> Points:
    """(tokens, value) where the row has a finite number under `key`; NaN and infinity cannot be drawn."""
    found = []
    for row in rows:
        value = row.get(key)
        if isinstance(value, int | float) and abs(value) < float("inf"):
            found.append((float(row.get("tokens", 0)), float(value)))
    return found


def read_curve(path: Path, name: str) -> Curve:
    """Read one log; a last line torn by a kill is passed over. Raises UserError for any other broken line."""
    rows = [row for _, row in read_jsonl(path, torn_ok=True)]
    curve = Curve(name)
    curve.loss, curve.averaged = thin(_numbers(rows, "loss"))
    curve.validation, _ = thin(_numbers(rows, "validation_loss"))
    curve.lr, _ = thin(_numbers(rows, "lr"))
    curve.steps = max((int(row.get("step", 0)) for row in rows), default=0)
    curve.tokens = max((int(row.get("tokens", 0)) for row in rows), default=0)
    speeds = sorted(y for _, y in _numbers(rows, "tokens_per_second"))
    curve.tokens_per_second = speeds[len(speeds) // 2] if speeds else None
    padding = [y for _, y in _numbers(rows, "padding_fraction")]
    curve.padding_fraction = sum(padding) / len(padding) if padding else None
    return curve


def read_curves(folder: Path, students: list[str]) -> dict[str, list[Curve]]:
    """Per student the logs that exist: its own and that of its answers-only twin, finished or not."""
    curves: dict[str, list[Curve]] = {}
    for student in students:
        for name, sub in ((student, student), (f"{student}/answers_only", f"{student}-answers_only")):
            # Until training is finished, everything of it lies in a folder beside the final one.
            found = [folder / "students" / f"{sub}{end}" / "training_log.jsonl" for end in ("", ".partial")]
            path = next((path for path in found if path.is_file()), None)
            if path is not None:
                curves.setdefault(student, []).append(read_curve(path, name))
    return curves

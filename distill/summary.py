"""The comparison as a table in the terminal, from results.json."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distill.errors import UserError


def print_summary(folder: Path, console: Console | None = None) -> None:
    """Print what the run found, and where its report is. Raises UserError if results.json is missing."""
    console = console or Console(highlight=False)
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; `distill run` or `distill report` writes it")
    results = json.loads(path.read_bytes())
    console.print()
    console.print(comparison_table(results))
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def comparison_table(results: dict[str, Any]) -> Table:
    """One block a student: itself, its baselines with the paired difference, and the teacher as the ceiling."""
    problems = results["problems"]
    table = Table(
        title=f"{results['run']}: mean accuracy on {problems['eval']} evaluation problems, 95% intervals",
        title_justify="left",
    )
    table.add_column("model")
    for name in ("accuracy", "student minus it", "truncated", "no answer", "tokens"):
        table.add_column(name, justify="right")
    for student in results["students"]:
        name = f"[bold]{student['name']}[/bold]"
        table.add_row(name, interval(student["mean"], student["ci95"]), "", *_rates(student))
        for baseline in student["baselines"]:
            difference = interval(baseline["paired_diff"], baseline["paired_ci95"], signed=True)
            table.add_row(
                f"  {baseline['name']}", interval(baseline["mean"], baseline["ci95"]), difference, *_rates(baseline)
            )
        table.add_section()
    teacher = results.get("teacher")
    if teacher and teacher.get("mean") is not None:
        table.add_row(f"teacher {teacher['name']}", interval(teacher["mean"], teacher["ci95"]), "", *_rates(teacher))
    return table


def interval(value: float, bounds: list[float], *, signed: bool = False) -> str:
    """'87.3% [85.0, 89.4]', or with signs '+12.0 [+9.1, +14.8]' in percentage points."""
    if signed:
        return f"{100 * value:+.1f} [{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]"
    return f"{100 * value:.1f}% [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _rates(entry: dict[str, Any]) -> list[str]:
    rates = [percent(entry[key]) if key in entry else "" for key in ("truncated", "no_answer")]
    return [*rates, f"{entry['tokens_mean']:.0f}" if "tokens_mean" in entry else ""]

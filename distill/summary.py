"""The comparison as a table in the terminal, from results.json."""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
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
    """One block a student: itself, its baselines with the paired difference, and the teacher as the ceiling.

    All but tokens in per cent; made to fit 80 columns.
    """
    title = f"{results['run']}: {results['problems']['eval']} evaluation problems, per cent with 95% intervals"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("model", no_wrap=True)
    for name in ("accuracy", "student minus it", "cut off", "no ans.", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for student in results["students"]:
        name = f"[bold]{student['name']}[/bold]"
        table.add_row(name, interval(student["mean"], student["ci95"]), "", *_rates(student))
        for baseline in student["baselines"]:
            difference = interval(baseline["paired_diff"], baseline["paired_ci95"], signed=True)
            accuracy = interval(baseline["mean"], baseline["ci95"])
            table.add_row(f"  {baseline['name']}", accuracy, difference, *_rates(baseline))
        table.add_section()
    teacher = results.get("teacher")
    if teacher and teacher.get("mean") is not None:
        table.add_row(
            f"teacher {escape(teacher['name'])}", interval(teacher["mean"], teacher["ci95"]), "", *_rates(teacher)
        )
    return table


def interval(value: float, bounds: list[float], *, signed: bool = False) -> str:
    """'87.3 [85.0, 89.4]', or a difference with signs: '+12.0 [+9.1, +14.8]'."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} [{100 * bounds[0]:{sign}.1f}, {100 * bounds[1]:{sign}.1f}]"


def _rates(entry: dict[str, Any]) -> list[str]:
    rates = [f"{100 * entry[key]:.1f}" if entry.get(key) is not None else "" for key in ("truncated", "no_answer")]
    return [*rates, f"{entry['tokens_mean']:.0f}" if entry.get("tokens_mean") is not None else ""]

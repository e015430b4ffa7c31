"""The page's sections as plain values for the template: rows, labels and drawn marks, each from results.json alone.

Nothing here decides how a run came out; sections without data are empty and the template leaves them out.
"""

import math
from typing import Any

from markupsafe import Markup

from distill.report import charts, words
from distill.report.curves import Curve

Row = dict[str, Any]


def _model(role: str, label: str, entry: Row) -> Row:
    return {"role": role, "label": label, "mark": Markup(charts.mark(role)), **entry}


def _baseline(entry: Row) -> Row:
    return _model(entry["name"], words.baseline_label(entry["name"]), entry)


def models_of(results: Row, student: Row) -> list[Row]:
    """A student's baselines, the student and the teacher, floor to ceiling. `key` is each one's name in `families`."""
    rows = [{**_baseline(b), "key": f"{student['name']}/{b['name']}"} for b in student["baselines"]]
    rows.append(_model("student", student["name"], {"key": student["name"], **student}))
    teacher = results.get("teacher")
    if teacher and teacher.get("mean") is not None:
        rows.append(_model("teacher", "teacher", {"key": "teacher", **teacher}))
    return rows


def plots(results: Row) -> list[Row]:
    """Per student the dot-and-whisker rows, the paired differences and the sentences that state them."""
    pairs = [row for student in results["students"] for row in _pairs(student)]
    # One axis for all students: the same distance must mean the same difference in both plots.
    axis = charts.nice_axis([x for row in pairs for x in row["paired_ci95"]], at_least=0.1, tight=True)
    return [_plot(results, student, axis) for student in results["students"]]


def _pairs(student: Row) -> list[Row]:
    """What the student was paired with: its baselines and, where it was measured, the teacher."""
    rows = [_baseline(b) for b in student["baselines"]]
    teacher = student.get("against_teacher")
    return rows + ([_model("teacher", "teacher", teacher)] if teacher else [])


def _plot(results: Row, student: Row, axis: charts.Axis) -> Row:
    scores = []
    for row in models_of(results, student):
        label = f"{row['label']}: {words.percent(row['mean'])}, 95% interval {words.interval(row['ci95'])}"
        svg = charts.whisker(row["role"], row["mean"], row["ci95"], charts.UNIT, label)
        scores.append({**row, "svg": Markup(svg)})
    differences = []
    for row in _pairs(student):
        mean, bounds = row["paired_diff"], row["paired_ci95"]
        label = f"minus {row['label']}: {words.points(mean)} points, 95% interval {words.point_interval(bounds)}"
        svg = charts.whisker(row["role"], mean, bounds, axis, label, zero=True)
        differences.append({**row, "svg": Markup(svg)})
    return {
        "name": student["name"],
        "samples": student["samples"],
        "sentences": words.student_sentences(student, results.get("teacher")),
        "scores": scores,
        "score_ticks": Markup(charts.ticks(charts.UNIT, [f"{100 * tick:.0f}%" for tick in charts.UNIT.ticks])),
        "differences": differences,
        "difference_ticks": Markup(charts.ticks(axis, [words.tick_points(tick) for tick in axis.ticks])),
    }


def families(results: Row) -> Row | None:
    """The table of families: one row each, the models in groups of a student and its baselines.

    None where all problems are of one family: the headline says it all.
    """
    if len(results["families"]) < 2:
        return None
    groups, columns = [], []
    teacher = results.get("teacher")
    if teacher and teacher.get("mean") is not None:
        groups.append({"name": "", "span": 1})
        columns.append(_model("teacher", "teacher", {"key": "teacher", "start": False}))
    for student in results["students"]:
        rows = [row for row in models_of(results, student) if row["role"] != "teacher"]
        groups.append({"name": student["name"], "span": len(rows)})
        columns += [{**row, "label": _trained_on(row), "start": index == 0} for index, row in enumerate(rows)]
    rows = [
        {
            **row,
            "family": row["family"] or "no family",
            "cells": [(row["means"].get(column["key"]), column["start"]) for column in columns],
        }
        for row in sorted(results["families"], key=lambda row: row["family"])
    ]
    smallest = min(row["problems"] for row in rows)
    # Half a 95% interval of a share of one half, from that many problems, were every sample of a problem alike.
    rough = math.ceil(100 * 1.96 * 0.5 / math.sqrt(smallest))
    return {"groups": groups, "columns": columns, "rows": rows, "smallest": smallest, "rough": rough}


def endings(results: Row) -> list[Row]:
    """Truncation, missing answers and length of every model: each student with its baselines, then the teacher."""
    groups = []
    for student in results["students"]:
        rows = [row for row in models_of(results, student) if row["role"] != "teacher"]
        groups.append({"name": student["name"], "rows": [{**row, "label": _trained_on(row)} for row in rows]})
    teacher = results.get("teacher")
    if teacher and teacher.get("mean") is not None:
        groups.append({"name": "teacher", "rows": [_model("teacher", teacher["name"], teacher)]})
    return groups


def _trained_on(row: Row) -> str:
    """Beside its baselines, a student is the one trained on traces."""
    return "traces" if row["role"] == "student" else row["label"]


def funnel(results: Row) -> Row | None:
    """Rows, problems and tokens left after each filter, with the filter's own drop.

    `problems` is None for a run whose funnel was counted before problems were.
    """
    steps = results["funnel"]
    if not steps:
        return None
    start = {"rows": steps[0]["in"], "problems": steps[0].get("problems_in"), "tokens": steps[0]["tokens_in"]}
    start["bar"] = Markup(charts.bar(1.0, 1.0))
    rows = []
    for step in steps:
        dropped = step["in"] - step["out"]
        share = step["out"] / start["rows"] if start["rows"] else 0.0
        before = step["in"] / start["rows"] if start["rows"] else 0.0
        rows.append(
            {
                **step,
                "dropped": dropped,
                "share": dropped / step["in"] if step["in"] else None,
                "bar": Markup(charts.bar(before, share)),
            }
        )
    left, tokens = steps[-1]["out"], steps[-1]["tokens_out"]
    share_left = words.percent(left / start["rows"]) if start["rows"] else "none"
    problems = steps[-1].get("problems_out")
    covered = "" if problems is None else f"for {words.count(problems)} of {words.count(start['problems'])} problems, "
    sentence = (
        f"{words.count(left)} of {words.count(start['rows'])} traces ({share_left}) pass every filter, {covered}"
        f"with {words.count(tokens)} of {words.count(start['tokens'])} tokens."
    )
    return {"start": start, "rows": rows, "sentence": sentence}


def training(curves: dict[str, list[Curve]]) -> tuple[list[Row], list[Row]]:
    """Per student its chart with the rows of the table; and the same series as numbers for the pointer."""
    drawn, series = [], []
    for student, found in curves.items():
        usable = [curve for curve in found if curve.loss]
        if not usable:
            continue
        chart, numbers = _chart(student, usable)
        drawn.append(chart)
        series.append(numbers)
    return drawn, series


def _role(curve: Curve) -> str:
    return "answers_only" if "/" in curve.name else "student"


def _curve_row(curve: Curve) -> Row:
    label = "traces" if _role(curve) == "student" else "answers only"
    facts = {"final_loss": curve.final_loss, "best_validation": curve.best_validation}
    return _model(_role(curve), label, {**vars(curve), **facts})


def _chart(student: str, curves: list[Curve]) -> tuple[Row, Row]:
    named = [(_role(curve), curve) for curve in curves]
    named.sort(key=lambda pair: pair[0])  # the student's line is drawn last, so on top
    across = charts.nice_axis([point[0] for _, curve in named for point in curve.loss + curve.validation], at_least=1)
    losses = charts.nice_axis([point[1] for _, curve in named for point in curve.loss + curve.validation], at_least=0.1)
    top_lr = max((y for _, curve in named for _, y in curve.lr), default=0.0) or 1.0
    lines, rates, numbers = [], [], []
    for role, curve in named:
        label = "traces" if role == "student" else "answers only"
        lines.append(charts.Line(role, curve.loss))
        numbers.append({"label": label, "points": curve.loss})
        if curve.validation:
            lines.append(charts.Line(f"{role} dashed", curve.validation, dots=len(curve.validation) <= 40))
            numbers.append({"label": f"{label}, validation", "points": curve.validation})
        rates.append(charts.Line(role, curve.lr))
    chart = {
        "name": student,
        "rows": [_curve_row(curve) for curve in curves],
        "loss": Markup(charts.lines(lines, across.high, losses, f"Loss of {student} against tokens seen")),
        "lr": Markup(charts.lines(rates, across.high, charts.Axis(0, top_lr, ()), f"Learning rate of {student}")),
        "lr_top": f"{top_lr:.2g}",
        "y_ticks": [f"{tick:g}" for tick in losses.ticks],
        "x_ticks": Markup(charts.ticks(across, [words.short_count(tick) for tick in across.ticks])),
    }
    return chart, {"x_high": across.high, "lines": numbers}


def cost(results: Row) -> Row | None:
    """Seconds and tokens a stage, with its share of the whole."""
    seconds = results["seconds"]
    if not seconds:
        return None
    total = sum(seconds.values())
    rows = []
    for stage, spent in seconds.items():
        tokens = results["tokens"].get(stage)
        rate = tokens / spent if tokens and spent else None
        drawn = Markup(charts.bar(0.0, spent / total if total else 0.0))
        row = {"stage": stage, "seconds": spent, "tokens": tokens, "rate": rate, "bar": drawn}
        rows.append({**row, "memory": results["peak_rss_bytes"].get(stage)})
    sentence = (
        f"{words.duration(total)} over the stages below, attempts that were killed included. "
        "Tokens are those generated, judged by the filters, or seen in training."
    )
    return {"rows": rows, "sentence": sentence}

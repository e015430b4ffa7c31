"""The page's section on how the traces were made: what each cost, how fast they came, how they ended."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from distill.generation.live import host
from distill.report import charts, words

Row = dict[str, Any]

# Fewer steps of time than this have no course worth drawing.
_FEWEST_STEPS = 4
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


def generation(results: Row) -> Row | None:
    """None without traces. What nothing measured is left out, such as the price of a teacher of one's own."""
    facts = results.get("generation")
    if not facts or not facts["finished"]:
        return None
    return {
        "sentence": _sentence(facts),
        "rows": _costs(facts),
        "accepted": facts["per_accepted"] is not None,
        "outcomes": _shares(facts["outcomes"], facts["finished"]),
        "errors": _shares(facts["errors"], sum(facts["errors"].values())),
        "endpoints": _endpoints(facts),
        "chart": _chart(facts),
    }


def _sentence(facts: Row) -> str:
    starts, wall = facts["starts"], facts["wall_seconds"]
    said = f"{words.count(facts['finished'])} samples finished"
    if wall is not None:
        said += f" in {words.duration(wall)}" + (f", over {words.count(starts)} starts" if starts > 1 else "")
    sentences = [said + "."]
    if latency := facts["latency"]:
        shown = [words.brief_seconds(latency[name]) for name in ("p50", "p90", "p99")]
        sentences.append(f"Half of them took at most {shown[0]} each, 90% {shown[1]} and 99% {shown[2]}.")
    if facts["retried"]:
        sentences.append(f"{words.count(facts['retried'])} took more than one attempt.")
    if failed := sum(facts["failed"].values()):
        sentences.append(f"Samples were given up {words.count(failed)} times, to be asked again at a later start.")
    return " ".join(sentences)


def _costs(facts: Row) -> list[Row]:
    """A row a kind of cost: in all, per finished and per accepted trace."""
    kinds = (
        ("prompt tokens", "prompt_tokens", words.short_count),
        ("generated tokens", "completion_tokens", words.short_count),
        ("time", "wall_seconds", words.brief_seconds),
        ("price", "cost", words.amount),
        ("GPU-hours", "gpu_hours", words.amount),
    )
    each = [facts["per_finished"], facts["per_accepted"]]
    return [
        {"name": name, "cells": [words_of(facts[key]), *(words_of(per[key]) for per in each if per)]}
        for name, key, words_of in kinds
        if facts[key]
    ]


def _shares(counts: dict[str, int], total: int) -> list[Row]:
    return [
        {"name": name, "count": count, "share": count / total, "bar": Markup(charts.bar(0.0, count / total))}
        for name, count in counts.items()
    ]


def _endpoints(facts: Row) -> list[Row]:
    """A row an endpoint, where there are several."""
    if len(facts["endpoints"]) < 2:
        return []
    return [
        {
            **entry,
            "name": host(name),
            "latency": [words.brief_seconds((entry["latency"] or {}).get(p)) for p in ("p50", "p90", "p99")],
            "errors": sum(entry["errors"].values()),
        }
        for name, entry in facts["endpoints"].items()
    ]


def _chart(facts: Row) -> Row | None:
    """Generated tokens a second, and below it finished samples a second, over the time that generation ran."""
    throughput, wall = facts["throughput"], facts["wall_seconds"] or 0.0
    if len(throughput["finished"]) < _FEWEST_STEPS:
        return None
    step = throughput["step_seconds"]
    tokens = _rates(throughput["completion_tokens"], step, wall)
    samples = _rates(throughput["finished"], step, wall)
    end = max(wall, tokens[-1][0])
    unit, size = next((unit, size) for unit, size in _UNITS if end >= 2 * size or size == 1)
    across = charts.Axis(0.0, end / size, charts.nice_axis([end / size], at_least=1, tight=True).ticks)
    rates = charts.nice_axis([rate for _, rate in tokens], at_least=1)
    top = max(rate for _, rate in samples) or 1.0
    upper = charts.lines([charts.Line("student", tokens)], end, rates, "Generated tokens a second over time")
    lower = charts.lines([charts.Line("student", samples)], end, charts.Axis(0, top, ()), "Samples a second over time")
    return {
        "tokens": Markup(upper),
        "samples": Markup(lower),
        "y_ticks": [words.short_count(tick) for tick in rates.ticks],
        "x_ticks": Markup(charts.ticks(across, [f"{tick:g}" for tick in across.ticks])),
        "unit": unit,
        "top": f"{top:.2g}" if top < 100 else words.short_count(top),
    }


def _rates(amounts: Sequence[int], step: float, wall: float) -> list[tuple[float, float]]:
    """(seconds, amount a second) at the middle of each step; the last one ends when generation did."""
    placed: list[tuple[float, float]] = []
    for index, amount in enumerate(amounts):
        start, end = index * step, (index + 1) * step
        if index == len(amounts) - 1 and start < wall < end:
            if wall - start < step / 4 and placed:  # too short to tell a rate
                break
            end = wall
        placed.append(((start + end) / 2, amount / (end - start)))
    return placed

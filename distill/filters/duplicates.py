"""duplicates: of traces that are the same text for the same problem, one is enough."""

from distill.identity import normalise
from distill.recipe import DuplicatesFilter
from distill.records import Problem, Trace, Verdict

VERSION = 1


def check(traces: list[Trace], problems: dict[str, Problem], settings: DuplicatesFilter) -> list[Verdict]:
    """Equal after normalisation in (problem, reasoning); the first in the order given is kept.

    The caller puts the traces that passed every other filter first, so that a rejected trace never stands in
    the way of an accepted one with the same reasoning.
    """
    first: dict[tuple[str, str], Trace] = {}
    verdicts = []
    for trace in traces:
        key = (normalise(problems[trace["problem_id"]]["problem"]), normalise(trace["reasoning"]))
        kept = first.setdefault(key, trace)
        if kept is trace:
            verdicts.append(Verdict(True, "the first with this reasoning"))
        else:
            verdicts.append(Verdict(False, f"same reasoning as sample {kept['sample']} (trace {kept['id']})"))
    return verdicts

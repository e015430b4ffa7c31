"""The filters, one file each, in the order of the funnel: cheap and certain ones first.

Each has `check(traces, problems, settings) -> list[Verdict]`, one verdict a trace in the traces' order, and a
VERSION that is raised when the same trace would get another verdict: the ledger reuses what was decided
under the same version and settings. Every filter judges every trace, also what another one has rejected,
so that a threshold can be changed and the funnel counted anew without asking the teacher again.
"""

from importlib import import_module
from types import ModuleType

ORDER = ("truncation", "format", "correctness", "length", "repetition", "duplicates")

# Filters that judge all traces together: their verdicts hold for one set of traces only.
COMPARING = frozenset({"duplicates"})


def filter_module(name: str) -> ModuleType:
    """The module of a filter in ORDER."""
    return import_module(f"distill.filters.{name}")

"""The filters, one file each, in the order of the funnel: cheap and certain ones first.

Each has `check(traces, problems, settings) -> list[Verdict]`, one verdict a trace in the traces' order, and a
VERSION that is raised when the same trace would get another verdict: the ledger reuses what was decided
under the same version and settings. Every filter judges every trace, also what another one has rejected,
so that a threshold can be changed and the funnel counted anew without asking the teacher again.

Those in COMPARING judge traces against each other. Their `check` has two halves (distill.filters.comparing), so that
a million traces need not be in memory together. A filter whose verdicts rest on more than trace, problem and settings
names the rest in `rests_on(settings)`.

Those in ASKING may ask a model (distill.filters.asking); their `check` takes one argument more, the folder where
replies are kept. Those in PAID ask about every trace, and judge only what passed all filters before.
"""

from importlib import import_module
from types import ModuleType

ASKING = ("correctness", "quality")
PAID = ("quality",)
COMPARING = ("agreement", "outliers", "near_duplicate_problems", "duplicates", "near_duplicates")
ORDER = (
    "truncation",
    "decontamination",
    "format",
    "correctness",
    "length",
    "repetition",
    "language",
    "readability",
    "reflection",
    "quality",
    *COMPARING,
)


def filter_module(name: str) -> ModuleType:
    """The module of a filter in ORDER."""
    return import_module(f"distill.filters.{name}")

"""decontamination: no training problem is an evaluation problem, or one in disguise.

Each problem is looked up in the evaluation sets that the recipe names (distill.filters.benchmarks): the same text
after normalisation; more than `max_overlap` of an item's stretches of `ngram` words, or a shorter item as a whole;
nearly the same words; the same with other numbers. All traces of such a problem are rejected. Every hit is listed
with both texts in the run's contamination.jsonl; sets, hashes and counts go into the manifest and the dataset's card.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from distill.filters.benchmarks import Match, open_index, source_key
from distill.recipe import DecontaminationFilter
from distill.records import Problem, Trace, Verdict

VERSION = 1


def check(traces: list[Trace], problems: dict[str, Problem], settings: DecontaminationFilter) -> list[Verdict]:
    chosen = settings.model_dump_json()
    return [_verdict(_find(chosen, problems[trace["problem_id"]]["problem"])) for trace in traces]


def _verdict(match: Match | None) -> Verdict:
    if match is None:
        return Verdict(True, "not in the evaluation sets")
    text = " ".join(match.text.split())
    shown = text if len(text) <= 120 else text[:117] + "..."
    return Verdict(
        False,
        f"{match.how} ({match.score:.2f}) as {match.benchmark}, row {match.item}: '{shown}'",
        {"overlap": match.score},
    )


@lru_cache(maxsize=4096)
def _find(settings: str, problem: str) -> Match | None:
    return open_index(settings).find(problem)


def rests_on(settings: DecontaminationFilter) -> list[Any]:
    """What verdicts depend on besides settings and problem: the content of the evaluation sets."""
    return [source_key(source) for source in settings.against]


def hits(problems: Iterable[Problem], settings: DecontaminationFilter) -> Iterator[dict[str, Any]]:
    """A row with both texts for each of these problems that is an evaluation problem."""
    chosen = settings.model_dump_json()
    for problem in problems:
        match = _find(chosen, problem["problem"])
        if match is not None:
            yield {
                "problem_id": problem["id"], "how": match.how, "score": match.score, "benchmark": match.benchmark,
                "row": match.item, "problem": problem["problem"], "evaluation_problem": match.text,
            }  # fmt: skip


def proof(settings: DecontaminationFilter) -> list[dict[str, Any]]:
    """Name, number of rows and hash of each evaluation set."""
    return list(open_index(settings.model_dump_json()).facts)

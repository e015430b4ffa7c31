"""decontamination: no training problem is an evaluation problem, or one in disguise.

Each problem is looked up in the evaluation sets that the recipe names (distill.filters.benchmarks): the same text
after normalisation; more than `max_overlap` of an item's stretches of `ngram` words, or a shorter item as a whole;
nearly the same words; the same with other numbers. All traces of such a problem are rejected. Every hit is listed
with both texts in the run's contamination.jsonl; sets, hashes and counts go into the manifest and the dataset's card.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from distill.filters.benchmarks import Match, Opened, clean_words, open_index, opened, source_key
from distill.recipe import DecontaminationFilter
from distill.records import Problem, Trace, Verdict

VERSION = 1


_KEPT = 20000  # problems whose result is remembered; their traces come in many batches
_found: dict[tuple[Opened, str], Match | None] = {}


def check(traces: list[Trace], problems: dict[str, Problem], settings: DecontaminationFilter) -> list[Verdict]:
    matches = _find([problems[trace["problem_id"]]["problem"] for trace in traces], settings)
    return [_verdict(match) for match in matches]


def _find(texts: Sequence[str], settings: DecontaminationFilter) -> list[Match | None]:
    chosen = opened(settings)
    index = open_index(chosen)
    if len(_found) > _KEPT:
        _found.clear()
    missing = [text for text in dict.fromkeys(texts) if (chosen, text) not in _found]
    for text, words in zip(missing, clean_words(missing), strict=True):
        _found[chosen, text] = index.find(words)
    return [_found[chosen, text] for text in texts]


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


def rests_on(settings: DecontaminationFilter) -> list[Any]:
    """What verdicts depend on besides settings and problem: the content of the evaluation sets."""
    return [source_key(source) for source in settings.against]


def hits(problems: Iterable[Problem], settings: DecontaminationFilter) -> Iterator[dict[str, Any]]:
    """A row with both texts for each of these problems that is an evaluation problem."""
    for problem in problems:
        [match] = _find([problem["problem"]], settings)
        if match is not None:
            yield {
                "problem_id": problem["id"], "how": match.how, "score": match.score, "benchmark": match.benchmark,
                "row": match.item, "problem": problem["problem"], "evaluation_problem": match.text,
            }  # fmt: skip


def proof(settings: DecontaminationFilter) -> list[dict[str, Any]]:
    """Name, number of rows and hash of each evaluation set."""
    return list(open_index(opened(settings)).facts)

"""contamination.jsonl, every training problem that is an evaluation problem with both texts, and the card's proof."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distill.filters import decontamination
from distill.jsonl import write_jsonl_atomic
from distill.lines import StoredProblems
from distill.recipe import DecontaminationFilter

if TYPE_CHECKING:
    from distill.runfolder import RunFolder


def write_contamination(
    run: "RunFolder",
    settings: DecontaminationFilter | None,
    problems: StoredProblems,
    hit: Sequence[int],
    compared: int,
) -> None:
    """`hit` are the lines of the problems that were found, `compared` how many problems were looked up.

    The manifest gets the evaluation sets with their hashes, the settings and the counts. Without settings an earlier
    file and proof go.
    """
    path = run.path("contamination.jsonl")
    if settings is None:
        path.unlink(missing_ok=True)
        if "decontamination" in run.manifest.data:
            run.manifest.update(decontamination=None)
        return
    found: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for row in decontamination.hits((problems.at(line) for line in hit), settings):
            found[row["how"]] += 1
            yield row

    write_jsonl_atomic(path, rows())
    proof = {
        "sets": decontamination.proof(settings),
        "settings": settings.model_dump(mode="json"),
        "problems": compared,
        "hits": dict(sorted(found.items())),
        "dropped": len(hit),
    }
    run.manifest.update(decontamination=proof)

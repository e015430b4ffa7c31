"""The dataset a student learns from: JSONL in the `messages` form, with a card, as one folder.

datasets.load_dataset("runs/NAME/dataset")                    # traces: train, validation
datasets.load_dataset("runs/NAME/dataset", "answers_only")    # the baseline: the same problems, no reasoning
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from distill.dataset_card import write_card
from distill.jsonl import write_jsonl_atomic
from distill.reasoning import CLOSE, OPEN, assistant_text
from distill.recipe import Recipe
from distill.records import DatasetRow, FunnelRow, Problem, Trace
from distill.selection import validation_problems

if TYPE_CHECKING:
    from distill.runfolder import RunFolder

Split = tuple[str, list[DatasetRow]]


def write_dataset(
    run: "RunFolder",
    recipe: Recipe,
    selected: Sequence[Trace],
    problems: Mapping[str, Problem],
    funnel: Sequence[FunnelRow],
) -> dict[str, Any]:
    """Write dataset/{train,validation}.jsonl, dataset/answers_only/ likewise, and the card last.

    Splits without rows have no file. Returns the counts for the manifest.
    """
    held = validation_problems([t["problem_id"] for t in selected], recipe.selection.validation_fraction, recipe.seed)
    folder = run.path("dataset")
    rows_by_file: dict[str, int] = {}
    for split, traces in _split(selected, held):
        first = {trace["problem_id"]: trace for trace in reversed(traces)}  # any will do: all were asked the same
        asked = list(dict.fromkeys(trace["problem_id"] for trace in traces))
        # Made as they are written: a large run's rows are not in memory together.
        rows = (trace_row(trace, problems[trace["problem_id"]]) for trace in traces)
        answers = (answer_row(problem, first[problem["id"]]) for problem in map(problems.__getitem__, asked))
        files: dict[str, Iterator[DatasetRow]] = {
            f"{split}.jsonl": rows,
            f"answers_only/{split}.jsonl": (row for row in answers if row["answer"] is not None),
        }
        for name, found in files.items():
            count = write_jsonl_atomic(folder / name, cast(Iterator[dict[str, Any]], found))
            if count:
                rows_by_file[name] = count
            else:
                (folder / name).unlink()
    write_card(run, recipe, rows_by_file, funnel)
    return {
        "train": rows_by_file.get("train.jsonl", 0),
        "validation": rows_by_file.get("validation.jsonl", 0),
        "answers_only": rows_by_file.get("answers_only/train.jsonl", 0),
    }


def _split(selected: Sequence[Trace], held: set[str]) -> Iterable[tuple[str, list[Trace]]]:
    yield "train", [trace for trace in selected if trace["problem_id"] not in held]
    yield "validation", [trace for trace in selected if trace["problem_id"] in held]


def trace_row(trace: Trace, problem: Problem) -> DatasetRow:
    """What the teacher was asked, and its whole reply in R1's form."""
    reply = assistant_text(trace["reasoning"], trace["response"])
    return {
        "messages": [*trace["messages"], {"role": "assistant", "content": reply}],
        "problem_id": problem["id"],
        "trace_id": trace["id"],
        "source": problem["source"],
        "answer": problem["answer"],
    }


def answer_row(problem: Problem, trace: Trace) -> DatasetRow:
    """The same question answered at once, with an empty think block, so that both students use one form."""
    reply = f"{OPEN}\n\n{CLOSE}\n\n\\boxed{{{problem['answer']}}}"
    return {
        "messages": [*trace["messages"], {"role": "assistant", "content": reply}],
        "problem_id": problem["id"],
        "source": problem["source"],
        "answer": problem["answer"],
    }

"""The dataset a student learns from: JSONL in the `messages` form, with a card, as one folder.

datasets.load_dataset("runs/NAME/dataset")                    # traces: train, validation
datasets.load_dataset("runs/NAME/dataset", "answers_only")    # the baseline: the same problems, no reasoning

llamafactory/dataset_info.json names the same files in LLaMA-Factory's way: its `dataset_dir`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from distill.dataset_card import write_card
from distill.difficulty import Bounds, PassRates, student_rates, teacher_rates
from distill.files import write_json_atomic
from distill.jsonl import read_jsonl, write_jsonl_atomic
from distill.mixture import mix
from distill.reasoning import CLOSE, OPEN, assistant_text
from distill.recipe import Recipe
from distill.records import DatasetRow, FunnelRow, Problem, Trace
from distill.reference import final_answer
from distill.selection import validation_problems

if TYPE_CHECKING:
    from distill.runfolder import RunFolder


def write_dataset(
    run: "RunFolder",
    recipe: Recipe,
    selected: Sequence[Trace],
    problems: Mapping[str, Problem],
    funnel: Sequence[FunnelRow],
) -> dict[str, Any]:
    """Write dataset/{train,validation}.jsonl, dataset/answers_only/ likewise, and the card last.

    `selected` has each problem's traces side by side; which problems it may hold, and how much of which source, is
    settled here (selection.difficulty, selection.mixture), and pass_rates.jsonl written if asked for. Splits without
    rows have no file. Returns the counts for the manifest.
    """
    selected, told = _narrow(run, recipe, selected, problems)
    held = validation_problems([t["problem_id"] for t in selected], recipe.selection.validation_fraction, recipe.seed)
    folder = run.path("dataset")
    rows_by_file: dict[str, int] = {}
    for split in ("train", "validation"):
        # Made as they are written: a large run's rows are not in memory together.
        files: dict[str, Iterator[DatasetRow]] = {
            f"{split}.jsonl": _rows(selected, problems, held, split),
            f"answers_only/{split}.jsonl": _answers(selected, problems, held, split),
        }
        for name, found in files.items():
            count = write_jsonl_atomic(folder / name, cast(Iterator[dict[str, Any]], found))
            if count:
                rows_by_file[name] = count
            else:
                (folder / name).unlink()
    _write_llama_factory(folder / "llamafactory", recipe.name, rows_by_file)
    write_card(run, recipe, rows_by_file, funnel, told)
    return {
        **told,
        "train": rows_by_file.get("train.jsonl", 0),
        "validation": rows_by_file.get("validation.jsonl", 0),
        "answers_only": rows_by_file.get("answers_only/train.jsonl", 0),
    }


def _narrow(
    run: "RunFolder", recipe: Recipe, selected: Sequence[Trace], problems: Mapping[str, Problem]
) -> tuple[Sequence[Trace], dict[str, Any]]:
    settings = recipe.selection
    path = run.path("pass_rates.jsonl")
    if settings.difficulty is None:
        path.unlink(missing_ok=True)
        if not settings.mixture and settings.max_tokens is None:
            return selected, {}
        return mix(selected, problems, settings, recipe.seed)
    teacher: PassRates | None = None
    if recipe.filters.correctness is not None or recipe.filters.agreement is not None:
        teacher = teacher_rates(run, recipe.filters)
        asked = (row["id"] for _, row in read_jsonl(run.path("problems.jsonl")))
        write_jsonl_atomic(path, teacher.lines(asked))
    student = student_rates(Path(settings.difficulty.student)) if settings.difficulty.student else None
    bounds = Bounds(settings.difficulty, teacher, student)
    return mix(selected, problems, settings, recipe.seed, bounds.allow)


def _rows(
    selected: Sequence[Trace], problems: Mapping[str, Problem], held: set[str], split: str
) -> Iterator[DatasetRow]:
    for trace in selected:
        identity = trace["problem_id"]
        if (identity in held) == (split == "validation"):
            yield trace_row(trace, problems[identity])


def _answers(
    selected: Sequence[Trace], problems: Mapping[str, Problem], held: set[str], split: str
) -> Iterator[DatasetRow]:
    """One a problem with an answer that can be boxed: tests of a code problem and patterns are none."""
    for identity, traces in groupby(selected, key=lambda trace: trace["problem_id"]):
        if (identity in held) != (split == "validation"):
            continue
        if final_answer(problems[identity]) is not None:
            yield answer_row(problems[identity], next(traces))


def _write_llama_factory(folder: Path, name: str, rows: Mapping[str, int]) -> None:
    """`dataset_dir: …/dataset/llamafactory`, `dataset: NAME`; files are named from there."""
    ends = {"train.jsonl": "", "validation.jsonl": "_validation", "answers_only/train.jsonl": "_answers_only"}
    described = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }  # fmt: skip
    entries = {f"{name}{end}": {"file_name": f"../{file}", **described} for file, end in ends.items() if file in rows}
    write_json_atomic(folder / "dataset_info.json", entries)


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
    reply = f"{OPEN}\n\n{CLOSE}\n\n\\boxed{{{final_answer(problem)}}}"
    return {
        "messages": [*trace["messages"], {"role": "assistant", "content": reply}],
        "problem_id": problem["id"],
        "source": problem["source"],
        "answer": problem["answer"],
    }

"""How hard problems are: the share of samples that were right, the teacher's and the base student's.

The teacher's comes from the ledger (all samples, also those that other filters dropped), the student's from a file
with a line a problem (`problem_id`, `pass_rate`) or a line a sample (`problem_id`, `correct`), as evals/*.jsonl are.
"""

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.jsonl import read_jsonl
from distill.lines import key
from distill.recipe import Filters
from distill.recipe_data import Difficulty

if TYPE_CHECKING:
    from distill.runfolder import RunFolder


class PassRates:
    """Of each problem: samples and how many of them were right; 32 bytes a problem."""

    def __init__(self, problems: "array[int]", right: "array[float]") -> None:
        import numpy as np

        keys = np.array(problems, dtype=np.int64)
        self.keys, group = np.unique(keys, return_inverse=True)
        self.samples = np.bincount(group, minlength=len(self.keys))
        self.rate = np.bincount(group, np.array(right, dtype=np.float64), len(self.keys)) / np.maximum(1, self.samples)

    def lines(self, problem_ids: Iterable[str]) -> Iterator[dict[str, Any]]:
        """A row a problem that has samples; as a file it can be another recipe's `student`."""
        for problem_id in problem_ids:
            if (found := self.of(problem_id)) is not None:
                yield {"problem_id": problem_id, "pass_rate": round(found[0], 6), "samples": found[1]}

    def of(self, problem_id: str) -> tuple[float, int] | None:
        """(pass rate, samples), or None for a problem without any."""
        import numpy as np

        wanted = key(problem_id)
        row = int(np.searchsorted(self.keys, wanted))
        if row == len(self.keys) or int(self.keys[row]) != wanted:
            return None
        return float(self.rate[row]), int(self.samples[row])


def teacher_rates(run: "RunFolder", filters: Filters) -> PassRates:
    """From verdicts.jsonl: right is what `correctness` passed, or without it what agrees with the majority."""
    name = "correctness" if filters.correctness is not None else "agreement"
    problems, right = array("q"), array("d")
    for _, line in read_jsonl(run.path("verdicts.jsonl")):
        problems.append(key(line["problem_id"]))
        right.append(float(line["verdicts"][name]["pass"]))
    return PassRates(problems, right)


def student_rates(path: Path) -> PassRates:
    """Raises UserError naming file, line and field."""
    problems, right = array("q"), array("d")
    for number, row in read_jsonl(path):
        place = f"{path}:{number}"
        if not isinstance(row.get("problem_id"), str):
            raise UserError(f"{place}: expected the field 'problem_id' with text in it")
        value: Any = row.get("pass_rate", row.get("correct"))
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise UserError(f"{place}: expected 'pass_rate' from 0 to 1, or 'correct' true or false, found {value!r}")
        problems.append(key(row["problem_id"]))
        right.append(float(value))
    if not problems:
        raise UserError(f"{path}: holds no pass rates (selection.difficulty.student)")
    return PassRates(problems, right)


class Bounds:
    """Whether a problem is neither too easy nor too hard. One that nobody tried often enough stays."""

    def __init__(self, settings: Difficulty, teacher: PassRates | None, student: PassRates | None) -> None:
        self.checks = []
        if teacher is not None:
            self.checks.append((teacher, settings.min_pass_rate, settings.max_pass_rate, settings.min_samples))
        if student is not None:
            self.checks.append((student, settings.student_min_pass_rate, settings.student_max_pass_rate, 1))

    def allow(self, problem_id: str) -> bool:
        for rates, low, high, least in self.checks:
            found = rates.of(problem_id)
            if found is not None and found[1] >= least and not low <= found[0] <= high:
                return False
        return True

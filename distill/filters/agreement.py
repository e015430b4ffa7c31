r"""agreement: without a reference answer, what most samples of a problem found is taken for right.

Self-consistency (Wang et al., arXiv 2203.11171) as a filter. Answers are compared as evals.grading normalises them
(typesetting, blanks, the value of numbers, whose unit some samples name and others leave out); two that only computer
algebra could equate count as different, so that agreement is understated and never invented. Samples that were cut off
or failed a filter before do not vote. Problems with a reference pass: `correctness` judges them.
"""

import hashlib
import sys
from typing import TYPE_CHECKING

from distill.filters.comparing import Judgement, Rows, by_problem, check_all
from distill.recipe import AgreementFilter
from distill.records import Problem, Trace, Verdict

if TYPE_CHECKING:
    import numpy as np

VERSION = 2
_SHOWN = 47  # bytes of the answer that are kept to be shown
WIDTH = 16 + 1 + _SHOWN  # hash, a flag, the answer's beginning
_REFERENCED, _SILENT, _ANSWERED = range(3)


def check(traces: list[Trace], problems: dict[str, Problem], settings: AgreementFilter) -> list[Verdict]:
    return check_all(sys.modules[__name__], traces, problems, settings)


def digest(traces: list[Trace], problems: dict[str, Problem], settings: AgreementFilter) -> "np.ndarray":
    import numpy as np

    found = np.zeros((len(traces), WIDTH), dtype=np.uint8)
    for row, trace in zip(found, traces, strict=True):
        problem = problems[trace["problem_id"]]
        if problem["answer"] is not None:
            continue
        answer = _answer(trace, problem["kind"])
        row[16] = _SILENT if answer is None else _ANSWERED
        if answer is not None:
            data = answer.encode("utf-8", "surrogatepass")
            row[:16] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), dtype=np.uint8)
            row[17 : 17 + min(len(data), _SHOWN)] = np.frombuffer(data[:_SHOWN], dtype=np.uint8)
    return found


def _answer(trace: Trace, kind: str) -> str | None:
    from evals.grading import extract_answer
    from evals.grading.exact import normalise, plain_string, value

    answer = extract_answer(trace["response"], kind) if trace["finish_reason"] in ("stop", "unknown") else None
    if answer is None or len(answer) > 2000:
        return None
    if kind == "exact":
        return plain_string(answer)
    stated = value(answer)
    return str(stated) if stated is not None else normalise(answer) or None


def compare(rows: Rows, settings: AgreementFilter) -> Judgement:
    import numpy as np

    size = len(rows.order)
    passed = np.ones(size, dtype=bool)
    votes = np.zeros(size, dtype=np.int64)  # samples of the problem with the same answer
    voters = np.zeros(size, dtype=np.int64)
    leading = np.full(size, -1, dtype=np.int64)  # a trace with the majority's answer
    flags = rows.payload[:, 16] if size else np.zeros(0, dtype=np.uint8)
    for group in by_problem(rows, np.flatnonzero(flags != _REFERENCED)):
        voting = group[rows.passed[group] & (flags[group] == _ANSWERED)]
        answers = [rows.payload[row, :16].tobytes() for row in group.tolist()]
        ballot: dict[bytes, list[int]] = {}
        for row in voting.tolist():
            ballot.setdefault(rows.payload[row, :16].tobytes(), []).append(row)
        voters[group] = len(voting)
        votes[group] = [len(ballot.get(answer, ())) for answer in answers]
        most = max(map(len, ballot.values()), default=0)
        enough = len(voting) >= settings.min_samples and most > settings.min_share * len(voting)
        if most:
            leading[group] = next(found[0] for found in ballot.values() if len(found) == most)
        passed[group] = enough & (votes[group] == most) & (flags[group] == _ANSWERED)

    def shown(row: int) -> str:
        return bytes(rows.payload[row, 17:]).rstrip(b"\0").decode("utf-8", "ignore")

    def reason(row: int) -> str:
        if flags[row] == _REFERENCED:
            return "the problem has a reference answer"
        if flags[row] == _SILENT:
            return "no answer to compare"
        if voters[row] < settings.min_samples:
            return f"{voters[row]} answered samples, fewer than {settings.min_samples}"
        said = f"{votes[row]} of {voters[row]} samples say {shown(row)}"
        if passed[row]:
            return said
        most = int(leading[row])
        if votes[most] > settings.min_share * voters[row]:
            return f"{said}, {votes[most]} say {shown(most)}"
        return f"{said}; no answer has more than {settings.min_share:.0%}"

    def measured(row: int) -> dict[str, float] | None:
        return {"agreement": round(votes[row] / voters[row], 4)} if voters[row] and flags[row] == _ANSWERED else None

    return Judgement(passed, reason, measured)

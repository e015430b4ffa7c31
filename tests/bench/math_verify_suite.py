r"""Math-Verify's published test cases as an outside suite for our maths verdict.

    pip download --no-deps --no-binary :all: math-verify==0.9.0 && tar xf math_verify-0.9.0.tar.gz
    OMP_NUM_THREADS=1 python -m tests.bench.math_verify_suite math_verify-0.9.0/tests

Takes every (gold, pred, expected) of the parametrised tests. Their texts are prose with an answer; ours grades
final answers, so a text's answer is its box, else its one $…$, else the whole text. The same answers also
go through Math-Verify alone, without our exact path: what it misses there is lost in the extraction, not by us.
Every miss of ours is printed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

from evals.grading import grade_many
from evals.grading.extract import last_boxed
from evals.grading.pool import shared_pool


def cases(folder: Path) -> list[tuple[str, str, bool]]:
    """(reference, text, whether they are to be equal); cases that ask for other settings are left out."""
    found = []
    for path in sorted(folder.glob("test_*.py")):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            for mark in function.decorator_list:
                if not isinstance(mark, ast.Call) or len(mark.args) != 2:
                    continue
                names = str(ast.literal_eval(mark.args[0])).replace(" ", "")
                if names.startswith("gold,pred,expected") and names.count(",") == 2:
                    assert isinstance(mark.args[1], ast.List)
                    for row in mark.args[1].elts:
                        if not any(isinstance(node, ast.JoinedStr) for node in ast.walk(row)):
                            gold, pred, expected = ast.literal_eval(row)
                            found.append((gold, pred, bool(expected)))
    return found


def answer(text: str) -> str:
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    spans = re.findall(r"\$\$?(.+?)\$\$?|\\\[(.+?)\\\]|\\\((.+?)\\\)", text, re.DOTALL)
    return "".join(spans[-1]) if len(spans) == 1 else text


def main(folder: Path) -> None:
    rows = cases(folder)
    graded = grade_many([(f"\\boxed{{{answer(pred)}}}", answer(gold), "math") for gold, pred, _ in rows])
    alone = [shared_pool().compare(answer(pred), answer(gold), 5.0)[0] for gold, pred, _ in rows]
    ours: Counter[bool] = Counter()
    theirs: Counter[bool] = Counter()
    for (gold, pred, expected), grade, other in zip(rows, graded, alone, strict=True):
        right = (grade.verdict == "correct") == expected
        ours[right] += 1
        theirs[(other == "correct") == expected] += 1
        if not right:
            same = "" if (other == "correct") == (grade.verdict == "correct") else f"; math-verify alone: {other}"
            print(f"  {answer(pred)!r} against {answer(gold)!r}: {grade.verdict} ({grade.reason}){same}")
    print(f"{len(rows)} cases: ours as expected {ours[True]}, Math-Verify alone on the same answers {theirs[True]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

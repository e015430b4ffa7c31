import io
import json

import pytest
from rich.console import Console

from distill.errors import UserError
from distill.summary import interval, print_summary

BASELINE = {"name": "base", "mean": 0.1, "ci95": [0.08, 0.12], "paired_diff": 0.7, "paired_ci95": [0.65, 0.75]}
STUDENT = {
    "name": "tiny-qwen", "family": "qwen2", "mean": 0.8, "ci95": [0.78, 0.82], "truncated": 0.015, "no_answer": 0.02,
    "tokens_mean": 123.4, "baselines": [{**BASELINE, "min_detectable_diff": 0.03}],
}  # fmt: skip
RESULTS = {
    "run": "quickstart",
    "problems": {"train": 10, "eval": 350, "overlap": 0},
    "teacher": {"name": "tiny-r1", "mean": 0.97, "ci95": [0.96, 0.98]},
    "funnel": [],
    "students": [STUDENT],
    "seconds": {},
    "tokens": {},
}


def shown(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    out = io.StringIO()
    print_summary(tmp_path, Console(file=out, width=80))
    return out.getvalue()


def test_each_model_has_its_line(tmp_path):
    text = shown(tmp_path, RESULTS)
    assert "350 evaluation problems" in text
    lines = text.splitlines()
    (student,) = [line for line in lines if line.startswith("tiny-qwen ")]
    assert "80.0 [78.0, 82.0]" in student and " 1.5 " in student and " 2.0 " in student and "123" in student
    (base,) = [line for line in lines if " base " in line]
    assert "10.0 [8.0, 12.0]" in base and "+70.0 [+65.0, +75.0]" in base
    (teacher,) = [line for line in lines if "teacher tiny-r1" in line]
    assert "97.0 [96.0, 98.0]" in teacher
    assert lines[-1] == f"report: {tmp_path / 'report.html'}"


def test_a_run_without_the_teacher_s_evaluation(tmp_path):
    text = shown(tmp_path, {**RESULTS, "teacher": {"name": "tiny-r1", "mean": None, "ci95": None}})
    assert "tiny-qwen" in text and "teacher tiny-r1" not in text


def test_missing_results(tmp_path):
    with pytest.raises(UserError, match=r"results\.json: no such file"):
        print_summary(tmp_path)


def test_interval():
    assert interval(0.5, [0.25, 0.75]) == "50.0 [25.0, 75.0]"
    assert interval(-0.01, [-0.1, 0.08], signed=True) == "-1.0 [-10.0, +8.0]"

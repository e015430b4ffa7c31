"""From samples on disk to the teacher, students and families of results.json."""

import json

import pytest

from evals.compare import Compared, compare, load_scored, samples_file


def write(folder, model, table, **changes):
    """`table`: problem id -> string of one character a sample, 1 correct, 0 wrong, t truncated, n without an answer."""
    path = samples_file(folder, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"model": model, "task": "distill_problems", "problem_id": problem, "sample": sample, "text": "",
         "correct": mark == "1", "truncated": mark == "t", "no_answer": mark in "tn", "tokens": 10 + sample,
         "family": problem[0]} | changes
        for problem, marks in table.items()
        for sample, mark in enumerate(marks)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)), encoding="utf-8")
    return path


PROBLEMS = [f"{'ab'[n % 2]}{n}" for n in range(40)]


def make(folder):
    write(folder, "teacher", dict.fromkeys(PROBLEMS, "1111"))
    write(folder, "q", {p: "1110" if n % 4 else "111t" for n, p in enumerate(PROBLEMS)})
    write(folder, "q/base", dict.fromkeys(PROBLEMS, "n0t0"))
    write(folder, "q/answers_only", {p: "1110" if n % 2 else "1111" for n, p in enumerate(PROBLEMS)})
    return [Compared("q", "qwen2", ["base", "answers_only"])]


def test_the_parts_of_results_json(tmp_path):
    found = compare(tmp_path, make(tmp_path), teacher_name="tiny-r1", bootstrap=500)
    (student,) = found["students"]
    base, answers = student["baselines"]
    # The schema of the issue: later fields are added, none of these is renamed.
    assert {"name", "mean", "ci95"} <= found["teacher"].keys()
    wanted = {"name", "family", "mean", "ci95", "truncated", "no_answer", "tokens_mean", "baselines"}
    assert wanted <= student.keys()
    wanted = {"name", "mean", "ci95", "paired_diff", "paired_ci95", "min_detectable_diff"}
    assert wanted <= base.keys()
    assert (found["teacher"]["name"], found["teacher"]["mean"]) == ("tiny-r1", 1.0)
    assert (student["name"], student["family"], student["mean"], student["truncated"]) == ("q", "qwen2", 0.75, 1 / 16)
    assert student["no_answer"] == 1 / 16 and student["tokens_mean"] == 11.5 and student["samples"] == 4
    assert (base["name"], base["mean"], base["truncated"], base["no_answer"]) == ("base", 0, 0.25, 0.5)
    assert base["paired_diff"] == 0.75 and base["paired_ci95"] == [0.75, 0.75]
    assert (base["higher"], base["same"], base["lower"]) == (40, 0, 0)
    assert answers["name"] == "answers_only" and answers["paired_diff"] == pytest.approx(-0.125)
    assert answers["paired_ci95"][0] < -0.125 < answers["paired_ci95"][1] < 0
    assert (answers["higher"], answers["same"], answers["lower"]) == (0, 20, 20)
    assert student["against_teacher"]["paired_diff"] == -0.25
    assert json.loads(json.dumps(found)) == found


def test_families_hold_each_models_mean(tmp_path):
    found = compare(tmp_path, make(tmp_path), teacher_name="tiny-r1", bootstrap=100)
    means = {row["family"]: row["means"] for row in found["families"]}
    assert [(row["family"], row["problems"]) for row in found["families"]] == [("a", 20), ("b", 20)]
    assert means["a"] == {"teacher": 1.0, "q": 0.75, "q/base": 0.0, "q/answers_only": 1.0}
    assert means["b"]["q/answers_only"] == 0.75
    assert found["tasks"][0]["task"] == "distill_problems" and found["tasks"][0]["problems"] == 40


def test_without_teacher(tmp_path):
    found = compare(tmp_path, make(tmp_path), bootstrap=100)
    assert found["teacher"] is None and "against_teacher" not in found["students"][0]


def test_order_on_disk_does_not_matter(tmp_path):
    make(tmp_path)
    path = samples_file(tmp_path, "q")
    before = load_scored(path).correct_PK
    path.write_text("".join(sorted(path.read_text().splitlines(keepends=True))))
    assert (load_scored(path).correct_PK == before).all()


def test_what_cannot_be_compared_is_named(tmp_path):
    students = make(tmp_path)
    write(tmp_path, "q/base", dict.fromkeys(PROBLEMS[:-1], "0000"))
    with pytest.raises(ValueError, match=r"q\.base\.jsonl: 1 problems differ from the student's \(first: b39\)"):
        compare(tmp_path, students, bootstrap=100)
    write(tmp_path, "q/base", dict.fromkeys(PROBLEMS, "0000") | {"b7": "00"})
    with pytest.raises(ValueError, match=r"problem b7 has 2 of 4 samples; the evaluation is unfinished"):
        compare(tmp_path, students, bootstrap=100)
    samples_file(tmp_path, "q/base").unlink()
    with pytest.raises(ValueError, match=r"q\.base\.jsonl: no such file"):
        compare(tmp_path, students, bootstrap=100)
    samples_file(tmp_path, "q/base").write_text('{"problem_id": "a0", "sample"\n')
    with pytest.raises(ValueError, match=r"q\.base\.jsonl:1: not valid JSON"):
        compare(tmp_path, students, bootstrap=100)
    samples_file(tmp_path, "q/base").write_text("")
    with pytest.raises(ValueError, match=r"no samples in it"):
        compare(tmp_path, students, bootstrap=100)

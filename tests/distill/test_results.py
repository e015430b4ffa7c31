"""results.json: the schema that other tools read, right numbers in it, and honest gaps."""

import json
import math
from pathlib import Path

import pytest

from distill import results
from distill.recipe_load import load_recipe
from tests.distill.fake_run import make_run


def build(folder: Path) -> dict:
    manifest = json.loads((folder / "manifest.json").read_text())
    return results.build(load_recipe(str(folder / "recipe.yaml"), []), folder, manifest)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = make_run(tmp_path_factory.mktemp("runs") / "whole")
    return folder, build(folder)


def test_schema_of_the_issue(whole: tuple[Path, dict]) -> None:
    found = whole[1]
    assert {"run", "problems", "teacher", "funnel", "students", "seconds", "tokens"} <= set(found)
    assert {"train", "eval", "overlap"} <= set(found["problems"])
    assert {"name", "mean", "ci95"} <= set(found["teacher"])
    counts = {f"{what}{way}" for what in ("", "problems_", "tokens_") for way in ("in", "out")}
    assert all({"filter", *counts} == set(row) for row in found["funnel"])
    keys = {"name", "family", "mean", "ci95", "truncated", "no_answer", "tokens_mean", "baselines"}
    pair = {"name", "mean", "ci95", "paired_diff", "paired_ci95", "min_detectable_diff"}
    for student in found["students"]:
        assert keys <= set(student)
        assert [b["name"] for b in student["baselines"]] == ["base", "answers_only"]
        assert all(pair <= set(baseline) for baseline in student["baselines"])
    assert found["missing"] == []


def test_numbers_are_the_files(whole: tuple[Path, dict]) -> None:
    folder, found = whole
    for student in found["students"]:
        rows = [json.loads(line) for line in (folder / "evals" / f"{student['name']}.jsonl").open()]
        base = [json.loads(line) for line in (folder / "evals" / f"{student['name']}.base.jsonl").open()]
        right, base_right = (sum(row["correct"] for row in some) / len(some) for some in (rows, base))
        assert math.isclose(student["mean"], right)
        assert math.isclose(student["truncated"], sum(row["truncated"] for row in rows) / len(rows))
        assert math.isclose(student["tokens_mean"], sum(row["tokens"] for row in rows) / len(rows))
        assert math.isclose(student["baselines"][0]["paired_diff"], right - base_right, abs_tol=1e-12)
        assert student["ci95"][0] < student["mean"] < student["ci95"][1]
    assert found["problems"] == {"train": 60, "eval": 48, "overlap": 0}
    assert found["seconds"]["traces"] == 61.5 and found["tokens"]["traces"] == 412_000
    assert found["trained_on"] == len((folder / "dataset" / "train.jsonl").read_text().splitlines())


def test_is_plain_json_without_nan(whole: tuple[Path, dict]) -> None:
    assert json.loads(json.dumps(whole[1], allow_nan=False)) == whole[1]


@pytest.mark.parametrize("done", range(5))
def test_half_finished_run_says_what_is_missing(tmp_path: Path, done: int) -> None:
    stages = ("problems", "traces", "filter", "train", "eval")[:done]
    found = build(make_run(tmp_path / "run", stages=stages))
    said = " ".join(found["missing"])
    assert ("no traces yet" in said) == (done < 2)
    assert ("no verdicts" in said) == (done < 3)
    assert ("tiny-llama has not been trained" in said) == (done < 4)
    assert "no comparison yet" in said
    assert found["students"] == [] and found["teacher"]["mean"] is None


def test_missing_and_unfinished_evaluations_leave_the_rest(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    evals = folder / "evals"
    (evals / "tiny-llama.base.jsonl").unlink()
    cut = (evals / "tiny-qwen.answers_only.jsonl").read_text().splitlines()[:-1]
    (evals / "tiny-qwen.answers_only.jsonl").write_text("\n".join(cut) + "\n")
    (evals / "teacher.jsonl").unlink()
    found = build(folder)
    assert [[b["name"] for b in s["baselines"]] for s in found["students"]] == [["base"], ["answers_only"]]
    said = {line.split(": ")[0]: line for line in found["missing"]}
    assert "has 3 of 4 samples" in said["evaluation of tiny-qwen/answers_only"]
    assert "no such file" in said["evaluation of tiny-llama/base"]
    assert "no such file" in said["evaluation of teacher"]


def test_student_without_its_own_samples_is_left_out_and_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "evals" / "tiny-qwen.jsonl").write_text("")
    found = build(folder)
    assert [student["name"] for student in found["students"]] == ["tiny-llama"]
    assert any(line.startswith("evaluation of tiny-qwen: ") for line in found["missing"])


def test_unfinished_stage_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["eval"]["status"] = "running"
    manifest["stages"]["report"] = {"status": "running", "seconds": 0.1}
    found = results.build(load_recipe(str(folder / "recipe.yaml"), []), folder, manifest)
    assert found["missing"] == ["stage 'eval' is unfinished"]
    assert "report" not in found["seconds"]


def test_family_of_a_student_is_its_architecture(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "students" / "tiny-llama" / "config.json").write_text('{"model_type": "llama"}')
    assert [student["family"] for student in build(folder)["students"]] == ["qwen2", "llama"]

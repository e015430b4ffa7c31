"""The problems stage: files in the run folder, and the proof that training and evaluation do not meet."""

import hashlib
import json

import pytest

from distill import problems
from distill.errors import UserError
from distill.identity import held_out, problem_hash
from tests.distill.small_run import make_recipe, open_run


def run_stage(folder, **sections):
    recipe = make_recipe(**sections)
    with open_run(folder, recipe) as run:
        facts = problems.run(recipe, run)
        return facts, json.loads(run.path("manifest.json").read_text())


def texts(folder, name):
    return [p["problem"] for p in problems.read_problems(folder / name)]


def test_splits_default_to_train_and_heldout_and_the_proof_can_be_recomputed(tmp_path):
    facts, manifest = run_stage(tmp_path)
    train, evaluation = texts(tmp_path, "problems.jsonl"), texts(tmp_path, "eval_problems.jsonl")
    assert (len(train), len(evaluation)) == (12, 6) == (facts["train"], facts["eval"])
    assert not any(map(held_out, train)) and all(map(held_out, evaluation))
    proof = manifest["problems"]
    for name, found in (("train", train), ("eval", evaluation)):
        digest = hashlib.sha256("\n".join(sorted(map(problem_hash, found))).encode()).hexdigest()
        assert (proof[name]["sha256"], proof[name]["count"]) == (digest, len(found))
    assert proof["overlap"] == 0


def test_the_same_source_for_both_still_does_not_overlap(tmp_path):
    same = {"source": "reasoning-gym", "split": "heldout", "seed": 5, "families": {"gcd": {"max_value": 60}}}
    _, manifest = run_stage(tmp_path, problems={**same, "count": 30}, evals={"problems": {**same, "count": 20}})
    assert not set(texts(tmp_path, "problems.jsonl")) & set(texts(tmp_path, "eval_problems.jsonl"))
    assert manifest["problems"]["dropped"]["overlap"] == 20
    assert manifest["problems"]["train"]["count"] == 30


def test_files_that_share_rows_lose_them_on_the_training_side(tmp_path):
    rows = [{"problem": f"Problem {n}?", "answer": str(n)} for n in range(10)]
    for name, part in (("train.jsonl", rows), ("test.jsonl", rows[7:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    source = {"count": None, "families": {}}
    _, manifest = run_stage(
        tmp_path / "run",
        problems={**source, "source": str(tmp_path / "train.jsonl")},
        evals={"problems": {**source, "source": str(tmp_path / "test.jsonl")}},
    )
    assert texts(tmp_path / "run", "problems.jsonl") == [f"Problem {n}?" for n in range(7)]
    assert manifest["problems"]["dropped"] == {"overlap": 3, "repeats": 0}


def test_two_runs_give_the_same_bytes(tmp_path):
    run_stage(tmp_path / "a")
    run_stage(tmp_path / "b")
    for name in ("problems.jsonl", "eval_problems.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_recipe_without_own_evaluation_problems_has_none(tmp_path):
    _, manifest = run_stage(tmp_path, evals={"problems": None, "tasks": ["gsm8k"]})
    assert texts(tmp_path, "eval_problems.jsonl") == [] and manifest["problems"]["eval"]["count"] == 0


def test_an_evaluation_source_is_named_as_such(tmp_path):
    with pytest.raises(UserError, match=r"evals\.problems"):
        run_stage(tmp_path, evals={"problems": {"source": str(tmp_path / "none.jsonl")}})

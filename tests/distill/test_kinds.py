"""The kinds regex, reasoning-gym and judge from the recipe to the dataset, and what a recipe may not say of them."""

import json
from itertools import islice

import pytest

from distill.errors import UserError
from distill.filters import correctness
from distill.filters import format as format_filter
from distill.problems import build_problems, reasoning_gym_problems
from distill.recipe import FormatFilter, ProblemSource
from distill.recipe_load import load_recipe
from distill.reference import final_answer
from tests.distill.small_run import problem, trace

JUDGE = "{base_url: 'http://127.0.0.1:9/v1', model: m}"


def from_file(folder, row, **settings):
    (folder / "p.jsonl").write_text(json.dumps(row) + "\n")
    source = ProblemSource.model_validate({"source": str(folder / "p.jsonl"), **settings})
    [found], _ = build_problems(source, "problems", "train")
    return found


def verdict(of, reply):
    [found] = correctness.check([trace(of, f"Hm.\n</think>\n\n{reply}")], {of["id"]: of}, None)
    return found


def test_reasoning_gym_grades_with_its_own_scorers_if_asked():
    source = {"source": "reasoning-gym", "kind": "reasoning-gym", "count": 3, "families": {"countdown": {}}}
    found, _ = build_problems(ProblemSource.model_validate(source), "problems", "train")
    plain = islice(reasoning_gym_problems({"countdown": {}}, 0, "train"), 3)
    assert [p["id"] for p in found] == [p["id"] for p in plain] and {p["kind"] for p in found} == {"reasoning-gym"}
    of, entry = found[0], json.loads(found[0]["answer"])
    assert final_answer(of) == entry["answer"] and "=" not in entry["answer"]
    assert verdict(of, f"\\boxed{{{entry['answer']}}}").passed
    assert verdict(of, f"<answer>({entry['answer']})</answer>").passed  # written otherwise, and right
    assert not verdict(of, f"\\boxed{{1 + {entry['answer']}}}").passed


def test_rows_as_reasoning_gym_writes_them_are_taken_from_a_file(tmp_path):
    row = {"question": "2 + 2 =", "answer": "4", "metadata": {"source_dataset": "chain_sum", "source_index": 0}}
    of = from_file(tmp_path, row, problem="question", kind="reasoning-gym")
    assert json.loads(of["answer"]) == row and final_answer(of) == "4"
    assert verdict(of, "\\boxed{4}").passed and not verdict(of, "\\boxed{5}").passed


def test_tests_may_be_an_object_and_hold_what_looks_like_a_worked_solution(tmp_path):
    tests = {"asserts": ["assert f() == '#### 4'"]}
    of = from_file(tmp_path, {"problem": "Write f.", "answer": tests}, kind="code")
    assert json.loads(of["answer"]) == tests and final_answer(of) is None
    of = from_file(tmp_path, {"problem": "Write f.", "answer": json.dumps(tests)}, kind="code")
    assert json.loads(of["answer"]) == tests
    assert from_file(tmp_path, {"problem": "2+2?", "answer": "so #### 4"})["answer"] == "4"
    with pytest.raises(UserError, match="is a dict, expected text or a number"):
        from_file(tmp_path, {"problem": "2+2?", "answer": {"a": 1}})


def test_a_pattern_is_matched_and_never_learnt():
    of = problem("Name a number above 9.", r"[1-9]\d+", "regex")
    assert verdict(of, "\\boxed{12}").passed and not verdict(of, "\\boxed{7}").passed
    assert final_answer(of) is None and final_answer(problem()) == "4"
    [form] = format_filter.check([trace(of, "Hm.\n</think>\n\n12")], {of["id"]: of}, FormatFilter())
    assert not form.passed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("problems.kind=judge", "problems.kind: 'judge' needs somebody to ask: `filters.correctness.judge`"),
        ("evals.problems.kind=judge", "evals.problems.kind: 'judge' is not measured"),
        ("filters.correctness={without_reference: judge}", "`without_reference: judge` needs a `judge` to ask"),
        ("filters.quality={}", "missing key 'filters.quality.judge'"),
        ("filters.quality={judge: {base_url: 'ftp://x/v1', model: m}}", "expected an address such as http://"),
        ("filters.quality={judge: {base_url: 'http://x/v1', model: m, votes: 2}}", "expected an odd number"),
        ("filters.quality={judge: {base_url: 'http://x/v1', model: m, api_key: k}}", "unknown key"),
    ],
)
def test_what_a_recipe_may_not_say(override, message):
    with pytest.raises(UserError) as error:
        load_recipe("quickstart", [override])
    assert message in str(error.value)


@pytest.mark.parametrize("url", ["https://me:hunter2@x/v1", "https://x/v1?key=hunter2", "https://x/v1#hunter2"])
def test_a_key_in_an_address_is_refused_and_the_field_named(url, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"name: r\ntraces: {{source: x}}\nfilters: {{quality: {{judge: {{base_url: '{url}', model: m}}}}}}\n"
    )
    with pytest.raises(UserError, match=r"filters\.quality\.judge\.base_url: .*DISTILL_JUDGE_KEY") as error:
        load_recipe(path)
    assert "hunter2" not in str(error.value)


def test_a_recipe_whose_problems_need_a_judge_is_complete_with_one():
    given = ["problems.kind=judge", f"filters.correctness.judge={JUDGE}"]
    assert load_recipe("quickstart", given).filters.correctness.judge.votes == 3
    with pytest.raises(UserError, match=r"traces\.0\.kind: 'judge' needs"):
        load_recipe("quickstart", ["traces={source: x, kind: judge}"])

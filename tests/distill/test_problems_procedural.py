"""Generated problems: the same everywhere, once each, held out by their text, and clear errors."""

import json
import os
import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.identity import HELD_OUT_ONE_IN, held_out, normalise, problem_hash
from distill.problems import reasoning_gym_problems
from tests.distill.small_run import FAMILIES


def take(count, families=FAMILIES, seed=1, split="train", **options):
    return list(islice(reasoning_gym_problems(families, seed, split, **options), count))


def test_families_take_turns_and_no_problem_comes_twice():
    problems = take(400)
    assert [p["meta"]["family"] for p in problems[:4]] == ["gcd", "spell_backward"] * 2
    assert len({problem_hash(p["problem"]) for p in problems}) == 400
    assert {p["id"] for p in problems} == {problem_hash(p["problem"])[:16] for p in problems}


def test_splits_follow_the_hash_of_the_text():
    train, heldout, both = take(300), take(60, split="heldout"), take(2000, split=None)
    assert not any(held_out(p["problem"]) for p in train)
    assert all(held_out(p["problem"]) for p in heldout)
    share = sum(held_out(p["problem"]) for p in both) / len(both)
    assert share == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.03)


def test_split_is_the_rule_that_the_documents_state():
    for p in take(50, split=None):
        assert held_out(p["problem"]) == (int(problem_hash(p["problem"])[:8], 16) % 10 == 0)


def test_stream_depends_on_seed_and_family_only():
    assert take(60) == take(60)
    assert take(60) != take(60, seed=2)
    alone = take(30, families={"spell_backward": FAMILIES["spell_backward"]})
    assert alone == [p for p in take(60) if p["meta"]["family"] == "spell_backward"]


def test_stream_does_not_depend_on_the_process():
    families = {name: {} for name in ("chain_sum", "letter_counting", "leg_counting", "simple_equations", "products")}
    script = (
        "import json, sys; from itertools import islice; from distill.problems import reasoning_gym_problems; "
        "print(json.dumps(list(islice(reasoning_gym_problems(json.loads(sys.argv[1]), 3, 'train'), 40))))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(families)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == take(40, families=families, seed=3)


def test_kind_follows_the_answer():
    kinds = {p["meta"]["family"]: p["kind"] for p in take(4)}
    assert kinds == {"gcd": "math", "spell_backward": "exact"}


def test_reasoning_gyms_own_scorer_accepts_the_answer_with_the_metadata_kept():
    import reasoning_gym

    for p in take(10):
        dataset = reasoning_gym.create_dataset(p["meta"]["family"], seed=0, size=1)
        entry = {"question": p["problem"], "answer": p["answer"], "metadata": p["meta"]["metadata"]}
        assert dataset.score_answer(p["answer"], entry) == 1.0


def test_a_small_family_runs_out_and_says_how_many_there_are():
    families = {"gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 9}}
    stream = reasoning_gym_problems(families, 0, "train")
    found = []
    with pytest.raises(UserError, match=r"'gcd' has only (\d+) distinct training problems") as error:
        found.extend(iter(lambda: next(stream), None))
    everything = {problem_hash(p["problem"]) for p in take(3000, families=families, split="train", unique=False)}
    assert f"only {len(everything)} distinct" in str(error.value)


def test_without_unique_a_small_family_never_runs_out():
    families = {"gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 9}}
    problems = take(500, families=families, unique=False)
    assert len(problems) == 500 > len({p["id"] for p in problems})


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({"chain_sums": {}}, "no family 'chain_sums'; did you mean 'chain_sum'"),
        ({"gcd": {"max_valu": 3}}, "families.gcd.max_valu: 'gcd' has no setting 'max_valu'; did you mean 'max_value'"),
        ({"chain_sum": {"min_terms": 0}}, "families.chain_sum: .*min_terms must be positive"),
        ({"gcd": {"seed": 3}}, "families.gcd.seed: set by the recipe's own seed"),
        ({}, "at least one family"),
    ],
)
def test_mistakes_are_named_before_the_first_problem(families, message):
    with pytest.raises(UserError, match=message):
        reasoning_gym_problems(families, 0, "train")


@given(st.text(max_size=60))
def test_hash_ignores_case_blanks_and_compatibility_forms(text):
    assert normalise(normalise(text)) == normalise(text)
    assert problem_hash(f"  {text}\n\n") == problem_hash(text)
    assert problem_hash(text.replace(" ", "\u00a0 \t")) == problem_hash(text)


def test_hash_tells_different_problems_apart():
    assert problem_hash("2 + 3 =") != problem_hash("3 + 2 =")
    assert problem_hash("What is \uff12 + ２ ?") == problem_hash("what is 2 + 2 ?")

"""Ids of samples: the fast way gives what the plain definition gives, and only what decides a sample is in them."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.generation.merge import parse_shard
from distill.generation.plan import Planner, plan, sample_seed, sampling_record, trace_id
from distill.generation.survey import in_shard
from tests.distill.small_run import make_recipe, problem

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(
    identity=TEXT, text=TEXT, instruction=TEXT, teacher=TEXT, seed=st.integers(0, 2**31 - 1),
    temperature=st.floats(0, 2), top_p=st.floats(0.01, 1), max_tokens=st.integers(1, 10**9),
    logprobs=st.integers(0, 20), first=st.integers(0, 50),
)  # fmt: skip
def test_fast_ids_are_the_plain_ones(
    identity, text, instruction, teacher, seed, temperature, top_p, max_tokens, logprobs, first
):
    settings = {
        "samples": 60, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens,
        "instruction": instruction, "logprobs": logprobs,
    }  # fmt: skip
    recipe = make_recipe(seed=seed, sampling=settings)
    asked = {**problem(text), "id": identity}
    planner = Planner(recipe, teacher)
    for sample, number in enumerate(planner.ids(asked, first, first + 3), start=first):
        own_seed = sample_seed(seed, identity, sample)
        record = sampling_record(recipe.sampling, own_seed)
        assert f"{number:016x}" == trace_id(asked, sample, record, teacher)
        ask = planner.ask(asked, sample, number)
        assert (ask.id, ask.seed, planner.record(ask.seed)) == (f"{number:016x}", own_seed, record)


def test_an_id_is_what_it_was_before_there_were_other_settings():
    """What a folder of last year holds must be found again."""
    asked = problem()
    seed = int(hashlib.sha256(f"0/{asked['id']}/1".encode()).hexdigest()[:16], 16) >> 1
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 64, "instruction": "", "seed": seed}
    content = [asked["id"], asked["problem"], 1, sampling, "teacher@0"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    [identity] = Planner(make_recipe(), "teacher@0").ids(asked, 1, 2)
    assert f"{identity:016x}" == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("sampling", "same"),
    [
        ({"samples": 7}, True),
        ({"adaptive": {"most": 9}}, True),
        ({"logprobs": 0}, True),
        ({"logprobs": 3}, False),
        ({"temperature": 0.7}, False),
        ({"instruction": "Box it."}, False),
    ],
)
def test_how_many_samples_are_wanted_makes_no_other_samples(sampling, same):
    ids = [Planner(make_recipe(sampling=s), "t").ids(problem(), 0, 2) for s in ({}, sampling)]
    assert (ids[0] == ids[1]) is same


def test_adaptive_plans_go_up_to_the_most():
    recipe = make_recipe(sampling={"samples": 2, "adaptive": {"most": 5}})
    assert [sample for _, sample, _ in plan(recipe, [problem()], "t")] == [0, 1, 2, 3, 4]


def test_every_problem_is_in_one_shard():
    names = [f"{n:016x}" for n in range(2000)]
    for count in (1, 2, 5):
        parts = [{name for name in names if in_shard(name, (n, count))} for n in range(1, count + 1)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(names)
        assert all(len(part) > 2000 / count * 0.8 for part in parts)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/5", " 1/3"])
def test_a_shard_that_is_none(text):
    with pytest.raises(ValueError, match="expected I/N, the I-th of N parts"):
        parse_shard(text)

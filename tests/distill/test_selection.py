"""Which accepted traces are taken, of which problems, and how much of which source."""

import json
import statistics
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.dataset import write_dataset
from distill.difficulty import student_rates
from distill.errors import UserError
from distill.mixture import mix
from distill.recipe import Recipe, Selection
from distill.selection import select
from tests.distill.small_run import make_recipe, open_run, problem, trace

LENGTHS = st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1)


def of_lengths(lengths):
    """Traces of problems named by letters, as many and as long as told."""
    asked = {name: problem(f"Problem {name}") for name in lengths}
    return [
        trace(asked[name], "w " * (size - 1) + f"{number}\n</think>\n\n\\boxed{{4}}", number)
        for name, sizes in lengths.items()
        for number, size in enumerate(sizes)
    ]


def size(t):
    return t["reasoning_tokens"] + t["answer_tokens"]


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.sampled_from(["shortest", "median", "random", "diverse"]), st.integers(0, 3))
def test_the_choice_is_what_a_plain_one_makes(lengths, per_problem, choose, seed):
    found = of_lengths(lengths)
    chosen = select(iter(found), Selection(per_problem=per_problem, choose=choose), seed)
    by_problem: dict = {}
    for t in found:
        by_problem.setdefault(t["problem_id"], []).append(t)
    assert list(dict.fromkeys(t["problem_id"] for t in chosen)) == list(by_problem)  # in order, side by side
    for identity, own in by_problem.items():
        taken = [t for t in chosen if t["problem_id"] == identity]
        assert len(taken) == min(per_problem, len(own)) and len({t["id"] for t in taken}) == len(taken)
        middle = statistics.median(size(t) for t in own)
        if choose == "shortest":
            assert taken == sorted(own, key=lambda t: (size(t), t["sample"]))[:per_problem]
        elif choose == "median":
            assert taken == sorted(own, key=lambda t: (abs(size(t) - middle), size(t), t["sample"]))[:per_problem]
        elif choose == "diverse":
            assert taken[0] == min(own, key=lambda t: (size(t), t["sample"]))
        alone = select(own, Selection(per_problem=per_problem, choose=choose), seed)
        assert [t["id"] for t in alone] == [t["id"] for t in taken]  # whatever other problems there are


def test_nothing_accepted_gives_nothing():
    for choose in ("shortest", "median", "diverse", "random"):
        assert select([], Selection(choose=choose, per_problem=2), 0) == []


def test_diverse_takes_those_least_alike():
    asked = problem()
    texts = {
        "add": "we add two and two which gives four and that is the whole of it",
        "add again": "we add two and two which gives four and that is the whole of it indeed",
        "count": "count the fingers of both hands one by one until you reach the end of them all here",
        "count again": "count the fingers of both hands one by one until you reach the end of them all here too",
        "line": "on the number line start at two then take two steps right and look where you stand now my friend",
    }
    found = [trace(asked, f"{text}\n</think>\n\n\\boxed{{4}}", i) for i, text in enumerate(texts.values())]
    chosen = select(found, Selection(per_problem=3, choose="diverse"), 0)
    # The shortest, then one of each of the other ways: two are nowhere near one another.
    assert [list(texts)[t["sample"]] for t in chosen] == ["add", "count", "line"]
    # Beyond 64 the longer ones are not compared, and as many as asked for are found all the same.
    many = [trace(asked, f"{'so ' * i}{i}\n</think>\n\n\\boxed{{4}}", i) for i in range(90)]
    assert len(select(many, Selection(per_problem=80, choose="diverse"), 0)) == 80


def world(counts):
    """Problems of several sources, two traces each, and the problems by id."""
    asked = {}
    for source, (count, kind) in counts.items():
        for number in range(count):
            made = problem(f"{source} {number}", kind=kind) | {"source": source}
            asked[made["id"]] = made
    found = [trace(p, f"{'w ' * 8}{i}\n</think>\n\n\\boxed{{4}}", i) for p in asked.values() for i in range(2)]
    return asked, found


def counted(chosen, asked):
    totals: dict = {}
    for t in chosen:
        totals[asked[t["problem_id"]]["source"]] = totals.get(asked[t["problem_id"]]["source"], 0) + 1
    return totals


WORLD = {"numina/olympiads": (60, "math"), "numina/aops": (30, "math"), "am/chat": (50, "open"), "am/code": (9, "code")}


def mixed(found, asked, seed=0, **wanted):
    return mix(found, asked, Selection.model_validate(wanted), seed)


def test_weights_hold_and_the_scarcest_part_sets_the_scale():
    asked, found = world(WORLD)
    chosen, facts = mixed(
        found, asked, mixture=[{"sources": ["numina"], "weight": 3.0}, {"sources": ["am/c*t"], "weight": 1.0}]
    )
    totals = counted(chosen, asked)
    assert totals["numina/olympiads"] + totals["numina/aops"] == 180 and totals["am/chat"] == 60
    assert "am/code" not in totals and facts["in_no_part"] == 9
    assert [part["traces"] for part in facts["mixture"]] == [180, 60]
    assert [t for t in found if t in chosen] == chosen  # the order is kept


def test_r1s_own_mix_by_kind():
    asked, found = world(WORLD)
    kinds = [{"kinds": ["math", "code"], "weight": 3.0, "traces": 120}, {"kinds": ["open"], "weight": 1.0}]
    _, facts = mixed(found, asked, mixture=kinds)
    assert [part["traces"] for part in facts["mixture"]] == [120, 40]


def test_budgets_take_whole_problems_and_a_larger_one_adds_only():
    asked, found = world(WORLD)
    tokens = size(found[0])
    for seed in (0, 1):
        small, _ = mixed(found, asked, seed, mixture=[{"sources": ["*"], "tokens": 41 * tokens}])
        large, _ = mixed(found, asked, seed, max_tokens=101 * tokens)
        assert (len(small), len(large)) == (40, 100)  # not half a problem
        assert {t["id"] for t in small} < {t["id"] for t in large}
        assert mixed(found, asked, seed, max_tokens=101 * tokens)[0] == large
    assert {t["id"] for t in mixed(found, asked, 2, max_tokens=101 * tokens)[0]} != {t["id"] for t in large}


def test_weights_by_tokens():
    asked, found = world(WORLD)
    for t in found:
        if asked[t["problem_id"]]["source"] == "am/chat":
            t["reasoning_tokens"] += 10
    parts = [{"sources": ["numina"], "weight": 1.0}, {"sources": ["am/chat"], "weight": 1.0}]
    chosen, facts = mixed(found, asked, mixture=parts, mixture_by="tokens")
    first, second = (part["tokens"] for part in facts["mixture"])
    assert abs(first - second) <= 2 * max(map(size, chosen))
    assert facts["mixture"][0]["traces"] == 180 > facts["mixture"][1]["traces"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"mixture": [{"sources": ["nowhere"], "weight": 1.0}]}, r"mixture\.0: .* is of nowhere, .*; there are"),
        ({"mixture": [{"sources": ["nowhere"]}]}, r"no accepted trace is left: .* 149 in no part"),
        ({"max_tokens": 3}, r"larger than the budgets"),
    ],
)
def test_a_mixture_of_nothing_is_told(wanted, message):
    asked, found = world(WORLD)
    with pytest.raises(UserError, match=message):
        mixed(found, asked, **wanted)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"mixture": [{"weight": 1.0}, {}]}, "give every part a weight, or none"),
        ({"difficulty": {"min_pass_rate": 0.9, "max_pass_rate": 0.2}}, r"min_pass_rate 0.9 is above max_pass_rate 0.2"),
        ({"difficulty": {"student_max_pass_rate": 0.5}}, "need its pass rates in `student`"),
    ],
)
def test_settings_that_cannot_be_meant(wanted, message):
    with pytest.raises(ValueError, match=message):
        Selection.model_validate(wanted)


def test_bounds_need_a_filter_that_tells_right_from_wrong():
    tree = make_recipe().model_dump()
    tree["filters"] = {"format": {}}
    tree["selection"] = {"difficulty": {"max_pass_rate": 0.9}}
    with pytest.raises(ValueError, match=r"pass rates come from `filters\.correctness` or `filters\.agreement`"):
        Recipe.model_validate(tree)


def graded(folder, rates, difficulty, **more):
    """A dataset of problems that were solved as often as told; returns the problems in it, by number."""
    asked = [problem(f"What is {n} + {n}?", "4") for n in range(len(rates))]
    recipe = make_recipe(selection={"difficulty": difficulty, "validation_fraction": 0.0, **more})
    found = []
    with open_run(folder, recipe) as run:
        ledger = []
        for p, (right, samples) in zip(asked, rates, strict=True):
            for number in range(samples):
                t = trace(p, f"{number}\n</think>\n\n\\boxed{{4}}", number)
                found += [t] if number < right else []
                verdicts = {"correctness": {"pass": number < right, "reason": "", "key": ""}}
                ledger.append({"trace_id": t["id"], "problem_id": p["id"], "sample": number, "verdicts": verdicts})
        run.path("verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
        run.path("problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in asked))
        chosen = select(found, recipe.selection, recipe.seed)
        facts = write_dataset(run, recipe, chosen, {p["id"]: p for p in asked}, [])
    lines = (folder / "dataset" / "train.jsonl").read_text().splitlines()
    numbers = {p["id"]: n for n, p in enumerate(asked)}
    return [numbers[json.loads(line)["problem_id"]] for line in lines], facts, asked


RATES = [(4, 4), (2, 4), (1, 4), (1, 2), (1, 1)]


def test_difficulty_from_the_teachers_pass_rate(tmp_path):
    kept, facts, asked = graded(tmp_path / "a", RATES, {"min_pass_rate": 0.3, "max_pass_rate": 0.9, "min_samples": 2})
    assert kept == [1, 3, 4]  # the last was tried once, which says nothing
    assert facts["outside_difficulty"] == 2
    rates = [json.loads(line) for line in (tmp_path / "a" / "pass_rates.jsonl").read_text().splitlines()]
    assert [row["pass_rate"] for row in rates] == [1.0, 0.5, 0.25, 0.5, 1.0]
    assert [row["problem_id"] for row in rates] == [p["id"] for p in asked]
    card = (tmp_path / "a" / "dataset" / "README.md").read_text()
    assert "between 0.3 and 0.9 (2 problems were outside)" in card


def test_difficulty_from_the_base_students_file(tmp_path):
    _, _, asked = graded(tmp_path / "a", RATES, {})
    scored = tmp_path / "student.jsonl"
    samples = [(asked[0], [True, True]), (asked[1], [False, False]), (asked[2], [True, False])]
    scored.write_text(
        "".join(json.dumps({"problem_id": p["id"], "correct": c}) + "\n" for p, cs in samples for c in cs)
        + json.dumps({"problem_id": asked[3]["id"], "pass_rate": 0.75}) + "\n"
    )  # fmt: skip
    bounds = {"student": str(scored), "student_min_pass_rate": 0.1, "student_max_pass_rate": 0.8}
    assert graded(tmp_path / "b", RATES, bounds)[0] == [2, 3, 4]  # the last one it was not asked
    # What this toolkit writes of a teacher is such a file.
    own = {"student": str(tmp_path / "a" / "pass_rates.jsonl"), "student_max_pass_rate": 0.4}
    assert graded(tmp_path / "c", RATES, own)[0] == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"problem_id": "a", "pass_rate": 0.5}\n{"problem_id": "a", "pass_rate": 1.5}\n',
            r"s\.jsonl:2: .* found 1\.5",
        ),
        ('{"problem": "a", "pass_rate": 0.5}\n', r"s\.jsonl:1: expected the field 'problem_id'"),
        ('{"problem_id": "a"}\n', r"s\.jsonl:1: expected 'pass_rate' from 0 to 1, or 'correct'"),
        ("", r"s\.jsonl: holds no pass rates"),
        ("{\n", r"s\.jsonl:1: the line is not valid JSON"),
    ],
)
def test_a_bad_file_of_pass_rates_is_named(tmp_path, text, message):
    (tmp_path / "s.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        student_rates(tmp_path / "s.jsonl")


def test_nothing_of_wanted_difficulty_is_told(tmp_path):
    with pytest.raises(UserError, match="5 are outside of `difficulty`"):
        graded(tmp_path, [(1, 1)] * 5, {"max_pass_rate": 0.5})


def test_without_settings_nothing_is_read_or_changed(tmp_path):
    asked, found = world({"a": (9, "math")})
    recipe = make_recipe()
    with open_run(tmp_path, recipe) as run:
        facts = write_dataset(run, recipe, found, asked, [])
    assert facts["train"] + facts["validation"] == len(found) and not (tmp_path / "pass_rates.jsonl").exists()
    assert all(a["problem_id"] != b["problem_id"] for a, b in combinations(found[::2], 2))

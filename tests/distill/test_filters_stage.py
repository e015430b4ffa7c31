"""The filter stage: ledger, reuse, funnel, replay without the teacher, and an error when nothing survives."""

import json
import re
import shutil
from collections import Counter

import pytest

from distill import filtering, problems, traces
from distill.errors import UserError
from distill.filters import COMPARING, ORDER, filter_module
from tests.distill.small_run import FakeTeacher, install, make_recipe, open_run, problem, right_reply, trace

USED = ("truncation", "format", "correctness", "length", "repetition", "duplicates")  # of the small recipe
GOOD = "Thinking of {seed}.\n</think>\n\nThe answer is \\boxed{{{answer}}}."


def mixed_reply(answers):
    """A teacher with every fault once in a while, decided by the sample's seed."""

    def reply(ask):
        answer, fault = answers[ask.messages[0]["content"]], ask.seed % 8
        good = "So " * (ask.seed % 5) + GOOD.format(seed=ask.seed, answer=answer)
        if fault == 0:
            return "on and on", "length"
        if fault == 1:
            return good.replace("\\boxed", ""), "stop"
        if fault == 2:
            return GOOD.format(seed=ask.seed, answer="0"), "stop"
        if fault == 3:
            return "round and round we go " * 20 + good, "stop"
        return (GOOD.format(seed=0, answer=answer) if fault == 4 else good), "stop"

    return reply


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A run folder with problems and the traces of a mixed teacher, which is gone afterwards."""
    recipe = make_recipe(
        problems={"count": 30}, sampling={"samples": 4}, filters={"length": {"max_reasoning_tokens": 80}}
    )
    with open_run(tmp_path / "run", recipe) as run:
        problems.run(recipe, run)
        asked = problems.read_problems(run.path("problems.jsonl"))
        install(monkeypatch, FakeTeacher(mixed_reply({p["problem"]: p["answer"] for p in asked})))
        traces.run(recipe, run)
    monkeypatch.setattr(
        traces, "identify_teacher", lambda settings: pytest.fail("the filter stage asked for the teacher")
    )
    monkeypatch.setattr(traces, "open_teacher", lambda *_: pytest.fail("the filter stage loaded the teacher"))
    return tmp_path / "run", recipe


def filter_stage(folder, recipe):
    with open_run(folder, recipe) as run:
        return filtering.run(recipe, run)


def ledger(folder):
    return [json.loads(line) for line in (folder / "verdicts.jsonl").read_bytes().split(b"\n") if line]


def tree(folder):
    return {
        p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name[0] != "."
    }


def count_checks(monkeypatch):
    """How many traces each filter is asked to judge, or to compare, from now on."""
    checks = Counter()
    for name in ORDER:
        module = filter_module(name)

        def counted(found, *rest, name=name, check=module.check):
            checks[name] += len(found)
            return check(found, *rest)

        monkeypatch.setattr(module, "check", counted)
        if name in COMPARING:

            def compared(rows, settings, name=name, compare=module.compare):
                checks[name] += len(rows.order)
                return compare(rows, settings)

            monkeypatch.setattr(module, "compare", compared)
    return checks


def test_every_trace_gets_every_verdict_with_a_reason(made):
    folder, recipe = made
    facts = filter_stage(folder, recipe)
    rows = ledger(folder)
    assert len(rows) == 120 and facts["judged"] == 120 * 6
    for row in rows:
        assert tuple(row["verdicts"]) == USED
        assert row["accepted"] == all(v["pass"] for v in row["verdicts"].values())
        assert all(v["reason"] for v in row["verdicts"].values())
    failed = Counter(name for row in rows for name, v in row["verdicts"].items() if not v["pass"])
    assert all(failed[name] for name in USED), failed
    assert facts["accepted"] == sum(row["accepted"] for row in rows) > 0


def test_the_funnel_can_be_counted_again_from_the_ledger_and_the_traces(made):
    folder, recipe = made
    filter_stage(folder, recipe)
    tokens = {}
    for line in (folder / "traces" / "traces.jsonl").read_text().splitlines():
        row = json.loads(line)
        tokens[row["id"]] = row["reasoning_tokens"] + row["answer_tokens"]
    left = ledger(folder)
    funnel = json.loads((folder / "funnel.json").read_text())
    assert [row["filter"] for row in funnel] == list(USED)
    for row in funnel:
        kept = [line for line in left if line["verdicts"][row["filter"]]["pass"]]
        assert (row["in"], row["out"]) == (len(left), len(kept))
        assert row["tokens_in"] == sum(tokens[line["trace_id"]] for line in left)
        assert row["tokens_out"] == sum(tokens[line["trace_id"]] for line in kept)
        left = kept
    assert len(left) == sum(row["accepted"] for row in ledger(folder))


def test_a_second_run_judges_nothing_and_changes_no_byte(made, monkeypatch):
    folder, recipe = made
    filter_stage(folder, recipe)
    before = tree(folder / "dataset"), (folder / "verdicts.jsonl").read_bytes()
    checks = count_checks(monkeypatch)
    facts = filter_stage(folder, recipe)
    assert facts["judged"] == 0 and not checks
    assert before == (tree(folder / "dataset"), (folder / "verdicts.jsonl").read_bytes())


def test_a_changed_threshold_reruns_its_filter_only_and_equals_a_fresh_run(made, monkeypatch):
    folder, recipe = made
    filter_stage(folder, recipe)
    changed = recipe.model_copy(deep=True)
    changed.filters.length.max_reasoning_tokens = 5
    shutil.copytree(folder, fresh := folder.with_name("fresh"))
    (fresh / "verdicts.jsonl").unlink()
    checks = count_checks(monkeypatch)
    filter_stage(folder, changed)
    # The set of duplicates depends on what passed before, so it is judged anew as well.
    assert set(checks) == {"length", "duplicates"}
    filter_stage(fresh, changed)
    assert tree(folder / "dataset") == tree(fresh / "dataset")
    assert (folder / "verdicts.jsonl").read_bytes() == (fresh / "verdicts.jsonl").read_bytes()


def test_a_changed_reference_answer_is_judged_again_for_its_problem_only(made, monkeypatch):
    folder, recipe = made
    filter_stage(folder, recipe)
    rows = problems.read_problems(folder / "problems.jsonl")
    rows[0]["answer"] = "123456"
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checks = count_checks(monkeypatch)
    filter_stage(folder, recipe)
    assert checks["correctness"] == 4
    assert not any(row["accepted"] for row in ledger(folder) if row["problem_id"] == rows[0]["id"])


def test_filters_that_are_off_have_no_verdict(made):
    folder, recipe = made
    off = recipe.model_copy(
        update={"filters": recipe.filters.model_copy(update={"correctness": None, "duplicates": None})}
    )
    filter_stage(folder, off)
    assert tuple(ledger(folder)[0]["verdicts"]) == ("truncation", "format", "length", "repetition")


def test_stale_traces_are_passed_over(made, monkeypatch):
    folder, recipe = made
    filter_stage(folder, recipe)
    fewer = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"samples": 1})})
    filter_stage(folder, fewer)
    assert len(ledger(folder)) == 30 and {row["sample"] for row in ledger(folder)} == {0}
    colder = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"temperature": 0.1})})
    with pytest.raises(UserError, match="holds no trace of this recipe's problems, teacher and sampling"):
        filter_stage(folder, colder)


def test_nothing_survives_is_one_sentence_that_names_the_filter_and_the_reason(made):
    folder, recipe = made
    strict = recipe.model_copy(deep=True)
    strict.filters.length.min_reasoning_tokens = 10**6
    with pytest.raises(UserError) as error:
        filter_stage(folder, strict)
    message = str(error.value)
    assert re.match(
        r"none of the 120 traces passed the filters: 'length' dropped the most, \d+ of \d+ \(mostly: ", message
    )
    assert "fewer than 1000000" in message and message.endswith("; no dataset was written") and "\n" not in message
    assert len(ledger(folder)) == 120 and (folder / "funnel.json").exists()


def test_traces_that_others_made_are_taken_as_they_are(tmp_path):
    of = problem()
    folder = tmp_path / "run"
    (folder / "traces").mkdir(parents=True)
    (folder / "problems.jsonl").write_text(json.dumps(of) + "\n")
    rows = [trace(of, sample=k, text=f"Thought {k}.\n</think>\n\n\\boxed{{4}}") for k in range(3)]
    (folder / "traces" / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert filter_stage(folder, make_recipe())["accepted"] == 3
    (folder / "traces" / "traces.jsonl").write_text(json.dumps({**rows[0], "problem_id": "elsewhere"}) + "\n")
    with pytest.raises(UserError, match=r"problem elsewhere of trace \w+ is not in problems\.jsonl"):
        filter_stage(folder, make_recipe())


def test_a_rejected_copy_does_not_shadow_an_accepted_one(tmp_path):
    of = problem()
    folder = tmp_path / "run"
    (folder / "traces").mkdir(parents=True)
    (folder / "problems.jsonl").write_text(json.dumps(of) + "\n")
    rows = [trace(of, "The same.\n</think>\n\nIt is 4.", 0), trace(of, "The same.\n</think>\n\n\\boxed{4}", 1)]
    (folder / "traces" / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filter_stage(folder, make_recipe())
    assert {row["sample"]: row["accepted"] for row in ledger(folder)} == {0: False, 1: True}


def test_all_good_traces_pass(tmp_path, monkeypatch):
    recipe = make_recipe()
    with open_run(tmp_path, recipe) as run:
        problems.run(recipe, run)
        install(monkeypatch, FakeTeacher(right_reply(problems.read_problems(run.path("problems.jsonl")))))
        traces.run(recipe, run)
        assert filtering.run(recipe, run)["accepted"] == 24

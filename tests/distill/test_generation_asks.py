"""What is asked for: adaptive waves, budgets, failures, draining, and the same decisions after a resume."""

import json
import signal
import threading

import pytest

from distill import problems
from distill.__main__ import explain
from distill.errors import Unfinished, UserError
from distill.generation.asks import ListedAsks
from distill.generation.survey import wave
from distill.pipeline import run_stages
from tests.distill.generation_runs import WRONG, adaptive, generate, luck, rows, samples_of
from tests.distill.small_run import FakeTeacher, install, make_recipe, open_run, right_reply


def test_solved_problems_get_no_more_and_hard_ones_do(tmp_path, monkeypatch):
    hard = {}

    def reply(ask, right):
        text = ask.messages[0]["content"]
        hard.setdefault(text, len(hard) % 3 == 0)
        return (WRONG, "stop") if hard[text] else right

    facts, _ = generate(tmp_path, monkeypatch, adaptive(), reply)
    made = samples_of(tmp_path)
    assert {text: len(samples) for text, samples in made.items()} == {
        text: 9 if is_hard else 2 for text, is_hard in hard.items()
    }
    assert all(sorted(samples) == list(range(len(samples))) for samples in made.values())
    assert facts["traces"] == facts["made"] == 4 * 9 + 8 * 2 and "missing" not in facts
    assert facts["generation"]["verified"] == {"right": 16, "wrong": 36}
    again, teacher = generate(tmp_path, monkeypatch, adaptive())
    assert (again["made"], teacher.asked) == (0, [])


@pytest.mark.parametrize(
    ("asked", "right", "needed", "most", "more"),
    [(4, 0, 1, 100, 6), (10, 0, 1, 100, 12), (10, 0, 1, 16, 6), (4, 3, 4, 100, 2), (1, 0, 1, 2, 1), (8, 7, 8, 99, 2)],
)
def test_a_wave_asks_for_what_the_rate_so_far_says(asked, right, needed, most, more):
    assert wave(asked, right, needed, most) == more


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_a_problem_ends_with_enough_right_ones_or_with_the_most(tmp_path, monkeypatch, at_once):
    recipe = adaptive(samples=1, most=12, verified=2)
    chance = lambda ask, right: right if luck(ask, 0.3) else (WRONG, "stop")  # noqa: E731
    generate(tmp_path, monkeypatch, recipe, chance, at_once)
    grades = {row["id"]: row["right"] for row in rows(tmp_path, "grades")}
    by_problem = {}
    for row in rows(tmp_path):
        by_problem.setdefault(row["problem_id"], {})[row["sample"]] = grades[row["id"]]
    assert len(by_problem) == 12
    for made in by_problem.values():
        assert sorted(made) == list(range(len(made)))
        assert sum(made.values()) >= 2 or len(made) == 12
    assert 24 < len(grades) < 100, "all the same, so nothing adapted"


def test_killed_anywhere_the_same_samples_are_made(tmp_path, monkeypatch):
    """A stop after n replies, for many n: the decisions follow from what is on the disk, whoever made it."""
    recipe = adaptive(samples=2, most=12, verified=2)

    def reply(ask, right):
        return right if luck(ask, 0.3) else (WRONG, "stop")

    generate(tmp_path / "whole", monkeypatch, recipe, reply)
    expected = sorted(row["id"] for row in rows(tmp_path / "whole"))
    count = 0

    def dies(ask, right):
        nonlocal count
        count += 1
        if count % 11 == 0:
            raise RuntimeError("killed")
        return reply(ask, right)

    for start in range(100):
        if start % 3 == 0:  # as a power cut leaves it
            (tmp_path / "broken" / "traces" / "grades.jsonl").unlink(missing_ok=True)
        try:
            generate(tmp_path / "broken", monkeypatch, recipe, dies)
            break
        except RuntimeError:
            pass
    assert 5 < start < 60
    assert sorted(row["id"] for row in rows(tmp_path / "broken")) == expected


def test_grades_are_kept_and_follow_the_answer(tmp_path, monkeypatch):
    recipe = adaptive(samples=1, most=2)
    generate(tmp_path, monkeypatch, recipe, lambda ask, right: (WRONG, "stop"))
    assert len(rows(tmp_path, "grades")) == 24
    monkeypatch.setattr("distill.filters.correctness.check", lambda *_: pytest.fail("graded again"))
    assert generate(tmp_path, monkeypatch, recipe)[0]["made"] == 0
    monkeypatch.undo()
    path = tmp_path / "problems.jsonl"
    edited = problems.read_problems(path)
    edited[0] |= {"kind": "exact", "answer": "no such thing"}
    path.write_text("".join(json.dumps(row) + "\n" for row in edited))
    generate(tmp_path, monkeypatch, adaptive(samples=1, most=3))
    assert sorted(map(len, samples_of(tmp_path).values())) == [2] + [3] * 11


def test_samples_of_an_earlier_recipe_count(tmp_path, monkeypatch):
    generate(tmp_path, monkeypatch, make_recipe(sampling={"samples": 6}), lambda ask, right: (WRONG, "stop"))
    facts, teacher = generate(tmp_path, monkeypatch, adaptive(samples=2, most=8), lambda ask, right: (WRONG, "stop"))
    assert len(teacher.asked) == 2 * 12 == facts["made"] and facts["traces"] == 8 * 12


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"filters": {"correctness": None}}, "sampling.adaptive needs `filters.correctness`"),
        (
            {"problems": {"source": "SOURCE", "families": {}, "count": None}},
            r"problems\.jsonl:2: problem \w+ has no reference answer, so `sampling.adaptive` could not tell",
        ),
        (
            {"problems": {"source": "SOURCE", "families": {}, "count": None, "kind": "open"}},
            r"problems\.jsonl:1: problem \w+ is of kind 'open', which needs `filters.correctness.judge`",
        ),
    ],
)
def test_what_cannot_be_graded_is_refused_before_anything_is_asked(tmp_path, monkeypatch, sections, message):
    source = tmp_path / "source.jsonl"
    source.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2", "answer": null}\n')
    text = json.dumps(sections).replace("SOURCE", str(source))
    with pytest.raises(UserError, match=message):
        generate(tmp_path / "run", monkeypatch, adaptive(**json.loads(text)), lambda ask, right: pytest.fail("asked"))


# Failures


def test_failed_samples_are_no_traces_and_are_asked_again(tmp_path, monkeypatch):
    calls = {}

    def reply(ask, right):
        calls[ask.id] = calls.get(ask.id, 0) + 1
        return ("http_500: upstream is gone", "failed") if ask.seed % 3 == 0 and calls[ask.id] < 3 else right

    facts, _ = generate(tmp_path, monkeypatch, make_recipe(), reply)
    failed = rows(tmp_path, "failures")
    assert 0 < len(failed) == facts["missing"] == 24 - facts["traces"]
    assert not {row["id"] for row in failed} & {row["id"] for row in rows(tmp_path)}
    assert all(row["error"] == "http_500: upstream is gone" and row["time"] for row in failed)
    assert facts["stopped"].startswith(
        f"{len(failed)} of 24 samples failed after 8 attempts: most often 'http_500: upst"
    )
    assert facts["stopped"].endswith("run again to go on")
    generate(tmp_path, monkeypatch, make_recipe(), reply)
    facts, teacher = generate(tmp_path, monkeypatch, make_recipe(), reply)
    assert {ask.id for ask in teacher.asked} == {row["id"] for row in failed}
    assert facts["traces"] == 24 and "missing" not in facts
    assert len(rows(tmp_path, "failures")) == 2 * len(failed)


def test_a_failure_keeps_its_problem_from_the_next_wave_until_it_is_made_good(tmp_path, monkeypatch):
    down = True

    def reply(ask, right):
        return ("timeout: 300 s", "failed") if down and ask.seed % 2 == 0 else (WRONG, "stop")

    recipe = adaptive(samples=2, most=6)
    facts, _ = generate(tmp_path, monkeypatch, recipe, reply)
    assert facts["missing"] == len(rows(tmp_path, "failures")) > 0
    down = False
    facts, _ = generate(tmp_path, monkeypatch, recipe, reply)
    assert facts["traces"] == 12 * 6 and "missing" not in facts


# Stopping


def stop_after(count, number=signal.SIGINT):
    """A reply that sends this process a signal with its count-th call."""
    made = 0

    def reply(ask, right):
        nonlocal made
        made += 1
        if made == count:
            signal.raise_signal(number)
        return right

    return reply


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_what_is_in_flight_finish(tmp_path, monkeypatch, capfd, number):
    before = signal.getsignal(number)
    facts, teacher = generate(tmp_path, monkeypatch, make_recipe(), stop_after(3, number), at_once=5)
    assert len(teacher.asked) == len(rows(tmp_path)) == facts["traces"] == 5
    assert (facts["missing"], facts["interrupted"]) == (19, True)
    assert facts["stopped"] == (
        "stopped as asked: 5 of 24 samples are there, 5 of them new, and 19 are missing; the same command goes on from "
        "here"
    )
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    facts, teacher = generate(tmp_path, monkeypatch, make_recipe())
    assert (len(teacher.asked), facts["traces"]) == (19, 24) and "interrupted" not in facts


def test_the_second_signal_stops_at_once(tmp_path, monkeypatch):
    def reply(ask, right):
        signal.raise_signal(signal.SIGINT)
        return right

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, monkeypatch, make_recipe(), reply, at_once=5)
    assert len(rows(tmp_path)) == 1 and signal.getsignal(signal.SIGINT) is before
    assert generate(tmp_path, monkeypatch, make_recipe())[0]["made"] == 23


def test_a_thread_can_run_the_stage(tmp_path, monkeypatch):
    made = []
    thread = threading.Thread(target=lambda: made.append(generate(tmp_path, monkeypatch, make_recipe())[0]["made"]))
    thread.start()
    thread.join()
    assert made == [24]


@pytest.mark.parametrize("again", [False, True])
def test_a_stopped_stage_is_not_done_but_what_it_made_can_be_filtered(tmp_path, monkeypatch, capfd, again):
    """Through the pipeline: `distill traces`, then `distill filter` and `distill traces` again."""
    recipe = make_recipe(filters={"duplicates": None})
    with open_run(tmp_path, recipe) as run:
        problems.run(recipe, run)
        right = right_reply(problems.read_problems(run.path("problems.jsonl")))
    stops = stop_after(3)
    install(monkeypatch, FakeTeacher(lambda ask: stops(ask, right(ask)), at_once=9))
    with pytest.raises(KeyboardInterrupt):
        run_stages(["problems", "traces"], recipe, tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text())["stages"]["traces"]
    assert (entry["status"], entry["missing"], entry["attempts"]) == ("stopped", 15, 1)
    assert "9 of 24 samples are there" in capfd.readouterr().err
    teacher = install(monkeypatch, FakeTeacher(right))
    if again:
        run_stages(["problems", "traces"], recipe, tmp_path)
        entry = json.loads((tmp_path / "manifest.json").read_text())["stages"]["traces"]
        assert (entry["status"], entry["attempts"], len(teacher.asked)) == ("done", 2, 15)
        assert "missing" not in entry
    run_stages(["filter"], recipe, tmp_path)
    assert len((tmp_path / "verdicts.jsonl").read_bytes().splitlines()) == (24 if again else 9)


def test_a_run_stops_there_with_a_sentence(tmp_path, monkeypatch):
    recipe = make_recipe(budget={"tokens": 100})
    with open_run(tmp_path, recipe) as run:
        problems.run(recipe, run)
        install(monkeypatch, FakeTeacher(right_reply(problems.read_problems(run.path("problems.jsonl")))))
    with pytest.raises(Unfinished) as stopped:
        run_stages(["problems", "traces", "filter"], recipe, tmp_path)
    code, sentence = explain(stopped.value)
    assert code == 1 and sentence.startswith("traces: stopped by the budget, for budget.tokens 100 has room for no")
    assert "are missing; raise it and start again, or go on with `distill filter`" in sentence
    assert not (tmp_path / "verdicts.jsonl").exists()


def test_listed_asks_are_given_once():
    asks = ListedAsks([1, 2, 3])
    assert (asks.take(2), asks.closed, asks.take(2), asks.closed, asks.take(2)) == ([1, 2], False, [3], True, [])

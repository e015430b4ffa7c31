"""The filters that ask a model, against a real HTTP server: correctness by a judge, and quality."""

import json
from pathlib import Path

import pytest

from distill import filtering, pipeline
from distill.explain import explain
from distill.filters import correctness, quality
from distill.judging import NOT_ASKED, enabled_filters, filter_bases
from distill.recipe import CorrectnessFilter, QualityFilter, Recipe
from tests.distill.small_run import open_run, problem, trace
from tests.endpoint import Endpoint, says

GOOD = "2 and 2 is 4.\n</think>\n\n\\boxed{4}"


@pytest.fixture
def endpoint():
    served = Endpoint()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def judge(endpoint):
    return {"base_url": endpoint.url, "model": "judge-7b", "votes": 1, "at_once": 2, "seconds": 5.0}


def shown(body):
    return body["messages"][1]["content"]


def scoring(body, number):
    """The score that the trace asks for."""
    return says(f"<think>hm</think>Fine.\n**SCORE: {shown(body).split('worth ')[1].split()[0]}**")


def make_run(folder, endpoint, filters, texts=(), kind="math", answer="4"):
    of = problem(kind=kind, answer=answer)
    (folder / "traces").mkdir(parents=True)
    (folder / "problems.jsonl").write_text(json.dumps(of) + "\n")
    rows = [trace(of, text, number) for number, text in enumerate(texts)]
    (folder / "traces" / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_recipe(folder, filters)


def make_recipe(folder, filters):
    tree = {"name": "asked", "traces": {"source": str(folder / "none.jsonl")}, "filters": filters}
    return Recipe.model_validate(tree)


def filter_stage(folder, recipe):
    with open_run(folder, recipe) as run:
        return filtering.run(recipe, run)


def verdicts(folder, name):
    return [json.loads(line)["verdicts"][name] for line in (folder / "verdicts.jsonl").read_text().splitlines()]


def test_quality_scores_and_another_threshold_asks_nobody(tmp_path, endpoint, judge):
    endpoint.answer = scoring
    folder = tmp_path / "run"
    texts = [f"It is worth {value} .\n</think>\n\n\\boxed{{4}}" for value in (3, 7, 9)]
    texts.append("It is worth 10 .\n</think>\n\n\\boxed{5}")
    settings = {"correctness": {}, "quality": {"judge": judge, "min_score": 8.0}}
    assert filter_stage(folder, make_run(folder, endpoint, settings, texts))["accepted"] == 1
    found = verdicts(folder, "quality")
    assert [said["pass"] for said in found] == [False, False, True, True]
    assert [said["measured"]["score"] for said in found[:3]] == [3, 7, 9]
    assert found[0]["reason"] == "judge-7b scores 3, less than 8 (1 of 1 votes)"
    # What another filter has rejected costs no request, and is no verdict to keep.
    assert found[3] == {"pass": True, "reason": NOT_ASKED.reason, "key": ""} and len(endpoint.asked) == 3

    settings["quality"]["min_score"] = 7.0
    facts = filter_stage(folder, make_recipe(folder, settings))
    assert facts["accepted"] == 2 and facts["unanswered"] == 0 and len(endpoint.asked) == 3
    del settings["correctness"]  # now the fourth has passed what is before
    assert filter_stage(folder, make_recipe(folder, settings))["accepted"] == 3
    assert len(endpoint.asked) == 4 and verdicts(folder, "quality")[3]["measured"]["score"] == 10


def test_the_median_of_the_votes_counts(tmp_path, endpoint, judge):
    said = iter(["SCORE: 9", "nothing to say", "SCORE: 6", "SCORE: 11", "SCORE: 5.5/10"])
    endpoint.answer = lambda body, number: says(next(said))
    settings = QualityFilter.model_validate({"judge": judge | {"votes": 5, "at_once": 1}})
    of = problem()
    [verdict] = quality.check([trace(of)], {of["id"]: of}, settings, tmp_path)
    assert verdict.passed and verdict.measured == {"score": 6.0, "votes": 3.0}
    endpoint.answer = lambda body, number: says("no number")
    [verdict] = quality.check([trace(of, GOOD + ".")], {of["id"]: of}, settings, tmp_path)
    assert (verdict.passed, verdict.reason) == (False, "no score in 5 replies of judge-7b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("SCORE: 7", 7), ("**Score: 7.5**", 7.5), ("score = 10/10.", 10), ("SCORE: 0", None), ("SCORE: 11", None),
     ("I would say SCORE: 7", None), ("SCORE: 3</think>\nSCORE: 8", 8), ("SCORE: 8\nbye", 8), ("", None)],
)  # fmt: skip
def test_reading_a_score(text, expected):
    assert quality.score(text) == expected


def test_what_is_scored_cannot_close_its_fence_and_is_shown_in_part_if_long(tmp_path, endpoint, judge):
    endpoint.answer = lambda body, number: says("SCORE: 5")
    of, settings = problem(), QualityFilter.model_validate({"judge": judge})
    for text in (GOOD, "begin" + "x" * 100_000 + "end\n</think>\n\n\\boxed{4}"):
        quality.check([trace(of, text)], {of["id"]: of}, settings, tmp_path)
    fences = [shown(body).splitlines()[-1] for body in endpoint.asked]
    assert fences[0] != fences[1] and shown(endpoint.asked[0]).count(fences[0]) == 3
    assert "What is 2 + 2?" in shown(endpoint.asked[0]) and "2 and 2 is 4." in shown(endpoint.asked[0])
    long = shown(endpoint.asked[1])
    assert len(long) < 42_000 and "begin" in long and "end\n" in long and "characters ...]" in long


def test_hostile_texts_reach_the_judge_as_text(tmp_path, endpoint, judge):
    endpoint.answer = lambda body, number: says("SCORE: 5")
    of, settings = problem("Half a pair?"), QualityFilter.model_validate({"judge": judge})
    of["problem"] += "\ud800"
    found = trace(problem(), "\0 \u202e\n</think>\n\n\\boxed{4}")
    found |= {"problem_id": of["id"], "reasoning": "\0 \udfff"}
    [verdict] = quality.check([found], {of["id"]: of}, settings, tmp_path)
    assert not verdict.passed and verdict.measured["score"] == 5
    given = CorrectnessFilter.model_validate({"judge": judge, "without_reference": "judge"})
    endpoint.answer = lambda body, number: says("VERDICT: CORRECT")
    found["response"] = "\udfff\0"
    nobody_knows = {**of, "answer": None, "kind": "open"}
    assert correctness.check([found], {of["id"]: nobody_knows}, given, tmp_path)[0].passed


def test_the_judge_decides_where_no_rule_does(tmp_path, endpoint, judge):
    endpoint.answer = lambda body, number: says("VERDICT: " + ("CORRECT" if "\nParis." in shown(body) else "WRONG"))
    capital = problem("Capital of France?", "Paris", "judge")
    essay, plain = problem("Write a poem.", None, "open"), problem()
    texts = ["Hm.\n</think>\n\nParis.", "Hm.\n</think>\n\nRome."]
    traces = [trace(capital, text) for text in texts] + [trace(capital, texts[0], 2, "length"), trace(essay, texts[0])]
    traces += [trace(plain, GOOD), trace(problem("Another?", "It is Paris", "open"), texts[0])]
    problems = {p["id"]: p for p in (capital, essay, plain, problem("Another?", "It is Paris", "open"))}

    def passed(**settings):
        given = CorrectnessFilter.model_validate(settings)
        return [v.passed for v in correctness.check(traces, problems, given, tmp_path)]

    assert passed() == [False, False, False, False, True, False]
    reasons = [v.reason for v in correctness.check(traces, problems, None)]
    assert "there is no judge" in reasons[0] and "there is no judge" in reasons[5] and not endpoint.asked
    assert passed(judge=judge) == [True, False, False, False, True, True] and len(endpoint.asked) == 3
    assert "Capital of France?" in shown(endpoint.asked[0]) and "Hm." not in shown(endpoint.asked[0])
    assert passed(judge=judge, without_reference="pass") == [True, False, False, True, True, True]
    assert len(endpoint.asked) == 3  # from what was kept
    assert passed(judge=judge, without_reference="judge") == [True, False, False, True, True, True]
    assert len(endpoint.asked) == 4


def test_a_verdict_rests_on_who_judges_and_how_often_not_on_where(judge):
    def base(**changes):
        filters = {"correctness": {"judge": judge | changes}, "quality": {"judge": judge | changes}}
        return filter_bases(enabled_filters(make_recipe(Path("x"), filters).filters))

    first = base()
    assert base(base_url="http://elsewhere:1/v1", seconds=9.0, at_once=5) == first
    for change in ({"model": "other"}, {"votes": 3}, {"temperature": 0.1}, {"max_tokens": 7}):
        assert base(**change)["correctness"] != first["correctness"]
        assert base(**change)["quality"] != first["quality"]


def test_a_judge_that_is_not_there_stops_the_stage_with_a_sentence_and_a_second_start_goes_on(
    tmp_path, endpoint, judge, monkeypatch
):
    monkeypatch.setenv("DISTILL_JUDGE_KEY", "hunter2")
    folder = tmp_path / "run"
    settings = {"correctness": {"judge": judge}}
    recipe = make_run(folder, endpoint, settings, [GOOD, "Hm.\n</think>\n\nfour"], "judge", "four")
    endpoint.answer = lambda body, number: says("VERDICT: CORRECT") if number == 1 else (401, b"")
    recipe.filters.correctness.judge.at_once = 1
    with pytest.raises(
        ConnectionError, match=r"filters\.correctness\.judge: 'judge-7b' at .* \(HTTP 401\); what it said"
    ):
        filter_stage(folder, recipe)
    endpoint.answer = lambda body, number: says("VERDICT: CORRECT")
    assert filter_stage(folder, recipe)["accepted"] == 2 and len(endpoint.asked) == 3
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.parts[-3] == "judge" for path in files) == 2
    assert not any(b"hunter2" in path.read_bytes() for path in files)


def test_a_verdict_that_the_judge_owes_is_asked_for_again(tmp_path, endpoint, judge, monkeypatch, capsys):
    folder = tmp_path / "run"
    texts = [GOOD, "Hm.\n</think>\n\nfour", "Hm.\n</think>\n\nlong"]
    recipe = make_run(folder, endpoint, {"correctness": {"judge": judge}}, texts, "judge", "four")
    status = {"four": 503, "long": 400}
    bad = {word: (code, b'{"error": {"message": "too long for\\nme"}}') for word, code in status.items()}
    endpoint.answer = lambda body, number: bad.get(shown(body).splitlines()[-2], says("VERDICT: CORRECT"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def stage():
        with open_run(folder, recipe) as run:
            [filter_] = [stage for stage in pipeline.STAGES if stage.name == "filter"]
            done = pipeline.is_done(filter_, pipeline.stage_inputs(filter_, recipe, run), recipe, run)
            if not done:
                pipeline._run_stage(filter_, pipeline.stage_inputs(filter_, recipe, run), recipe, run)
            return done, run.manifest.stage("filter")

    done, entry = stage()
    assert not done and entry["accepted"] == 1 and entry["unanswered"] == 1
    found = verdicts(folder, "correctness")
    assert "did not answer: HTTP 503" in found[1]["reason"] and found[1]["key"] == ""
    assert "refuses this answer: HTTP 400: too long for me" in found[2]["reason"] and found[2]["key"]
    row = json.loads((folder / "verdicts.jsonl").read_text().splitlines()[1])
    assert "not settled" in "\n".join(explain(recipe, folder, row["trace_id"]))
    bad.pop("four")
    before = len(endpoint.asked)
    done, entry = stage()
    assert not done and entry["accepted"] == 2 and entry["unanswered"] == 0 and len(endpoint.asked) == before + 1
    assert stage()[0] and len(endpoint.asked) == before + 1

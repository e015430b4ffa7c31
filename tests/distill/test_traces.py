"""The trace stage with a made-up teacher: what is asked, what is kept, what is made again and what is not."""

import json

import pytest

from distill import problems, traces
from distill.errors import UserError
from tests.distill.small_run import FakeTeacher, install, make_recipe, open_run, right_reply

WORDS = "thinking\n</think>\n\n\\boxed{1}"


def lines(folder):
    return [json.loads(line) for line in (folder / "traces" / "traces.jsonl").read_bytes().split(b"\n") if line]


def ids(folder):
    return [row["id"] for row in lines(folder)]


def run_stages(folder, monkeypatch, recipe, reply=None, identity="fake@000000000000", fresh_problems=True):
    """Problems and traces; returns (facts, the teacher with what it was asked)."""
    with open_run(folder, recipe) as run:
        if fresh_problems:
            problems.run(recipe, run)
        answers = right_reply(problems.read_problems(run.path("problems.jsonl")))
        teacher = install(monkeypatch, FakeTeacher(reply or answers, identity))
        return traces.run(recipe, run), teacher


def test_every_problem_gets_its_samples_with_distinct_seeds(tmp_path, monkeypatch):
    facts, _ = run_stages(tmp_path, monkeypatch, make_recipe())
    rows = lines(tmp_path)
    assert len(rows) == 24 == len({row["id"] for row in rows}) == facts["traces"]
    assert len({row["sampling"]["seed"] for row in rows}) == 24
    assert sorted((row["problem_id"], row["sample"]) for row in rows) == sorted(
        (p["id"], k) for p in problems.read_problems(tmp_path / "problems.jsonl") for k in range(2)
    )
    assert facts["tokens"] == sum(row["reasoning_tokens"] + row["answer_tokens"] for row in rows)
    assert all(row["teacher"] == "fake@000000000000" and row["cost"] == 0.0 for row in rows)


def test_the_id_can_be_recomputed_from_the_line(tmp_path, monkeypatch):
    import hashlib

    run_stages(tmp_path, monkeypatch, make_recipe())
    asked = {p["id"]: p for p in problems.read_problems(tmp_path / "problems.jsonl")}
    for row in lines(tmp_path):
        content = [
            row["problem_id"],
            asked[row["problem_id"]]["problem"],
            row["sample"],
            row["sampling"],
            row["teacher"],
        ]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert row["id"] == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_prompt_is_the_problem_and_the_instruction(tmp_path, monkeypatch):
    recipe = make_recipe(sampling={"instruction": "Box it."})
    _, teacher = run_stages(tmp_path, monkeypatch, recipe, reply=lambda ask: (WORDS, "stop"))
    texts = {p["problem"] for p in problems.read_problems(tmp_path / "problems.jsonl")}
    for ask in teacher.asked:
        [message] = ask.messages
        text, _, instruction = message["content"].rpartition("\n")
        assert text in texts and instruction == "Box it." and message["role"] == "user"
    assert (ask.temperature, ask.top_p, ask.max_tokens) == (0.6, 0.95, 64)


def test_a_second_run_asks_nothing_and_does_not_even_load_the_teacher(tmp_path, monkeypatch):
    run_stages(tmp_path, monkeypatch, make_recipe())
    before = ids(tmp_path)
    facts, teacher = run_stages(tmp_path, monkeypatch, make_recipe())
    assert (facts["made"], facts["resumed"], teacher.asked, ids(tmp_path)) == (0, 24, [], before)
    with open_run(tmp_path, make_recipe()) as run:
        monkeypatch.setattr(traces, "open_teacher", lambda *_: pytest.fail("loaded"))
        traces.run(make_recipe(), run)


def test_more_samples_only_add(tmp_path, monkeypatch):
    run_stages(tmp_path, monkeypatch, make_recipe())
    before = ids(tmp_path)
    facts, _ = run_stages(tmp_path, monkeypatch, make_recipe(sampling={"samples": 3}))
    assert facts["made"] == 12 and ids(tmp_path)[:24] == before
    fewer, _ = run_stages(tmp_path, monkeypatch, make_recipe(sampling={"samples": 1}))
    assert (fewer["made"], fewer["traces"], fewer["stale"]) == (0, 12, 24)


@pytest.mark.parametrize(
    "section", [{"sampling": {"temperature": 0.7}}, {"seed": 5}, {"sampling": {"instruction": "Box."}}]
)
def test_other_settings_make_other_traces_and_the_old_ones_wait(tmp_path, monkeypatch, section):
    reply = lambda ask: (WORDS, "stop")  # noqa: E731
    run_stages(tmp_path, monkeypatch, make_recipe(), reply)
    changed, _ = run_stages(tmp_path, monkeypatch, make_recipe(**section), reply)
    assert (changed["made"], changed["stale"], changed["traces"]) == (24, 24, 24)
    back, _ = run_stages(tmp_path, monkeypatch, make_recipe(), reply)
    assert (back["made"], back["traces"], len(ids(tmp_path))) == (0, 24, 48)


def test_another_teacher_makes_other_traces(tmp_path, monkeypatch):
    run_stages(tmp_path, monkeypatch, make_recipe())
    facts, _ = run_stages(tmp_path, monkeypatch, make_recipe(), identity="fake@111111111111")
    assert (facts["made"], facts["stale"]) == (24, 24)


def test_an_edited_problem_is_asked_again_and_nothing_else(tmp_path, monkeypatch):
    run_stages(tmp_path, monkeypatch, make_recipe())
    path = tmp_path / "problems.jsonl"
    rows = problems.read_problems(path)
    rows[3]["problem"] += " Take care."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts, teacher = run_stages(tmp_path, monkeypatch, make_recipe(), fresh_problems=False)
    assert facts["made"] == 2 and {ask.messages[0]["content"] for ask in teacher.asked} == {rows[3]["problem"]}


def test_a_torn_tail_is_cut_counted_and_made_again(tmp_path, monkeypatch):
    run_stages(tmp_path, monkeypatch, make_recipe())
    path = tmp_path / "traces" / "traces.jsonl"
    whole = path.read_bytes()
    everything = set(ids(tmp_path))
    path.write_bytes(whole[:-25])
    facts, teacher = run_stages(tmp_path, monkeypatch, make_recipe())
    assert (facts["torn"], facts["made"], len(teacher.asked)) == (1, 1, 1)
    assert set(ids(tmp_path)) == everything and len(ids(tmp_path)) == 24


def test_a_broken_line_in_the_middle_is_named(tmp_path, monkeypatch):
    run_stages(tmp_path, monkeypatch, make_recipe())
    path = tmp_path / "traces" / "traces.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([rows[0], b"{broken\n", *rows[2:]]))
    with pytest.raises(UserError, match=r"traces\.jsonl:2: the line is not valid JSON"):
        run_stages(tmp_path, monkeypatch, make_recipe())


@pytest.mark.parametrize("row", [{"problem": "1+1"}, {"id": "a"}, {"id": 5, "problem": "1+1"}])
def test_a_line_that_is_no_problem_is_named(tmp_path, monkeypatch, row):
    (tmp_path / "problems.jsonl").write_text(json.dumps({"id": "a", "problem": "?"}) + "\n" + json.dumps(row) + "\n")
    install(monkeypatch, FakeTeacher(lambda ask: pytest.fail("asked")))
    message = r"problems\.jsonl:2: expected the fields 'id' and 'problem' with text in them"
    with open_run(tmp_path, make_recipe()) as run, pytest.raises(UserError, match=message):
        traces.run(make_recipe(), run)


def test_a_problem_that_stands_in_the_file_twice_is_asked_once(tmp_path, monkeypatch):
    run_stages(tmp_path, monkeypatch, make_recipe(sampling={"samples": 1}))
    path = tmp_path / "problems.jsonl"
    path.write_bytes(2 * path.read_bytes())
    facts, teacher = run_stages(tmp_path, monkeypatch, make_recipe(), fresh_problems=False)
    assert (len(teacher.asked), facts["resumed"], len(set(ids(tmp_path)))) == (12, 12, 24)
    assert len(ids(tmp_path)) == facts["traces"] == 24


def test_a_teacher_that_dies_loses_nothing_finished(tmp_path, monkeypatch):
    recipe = make_recipe()
    count = 0

    def dies(ask):
        nonlocal count
        count += 1
        if count == 10:
            raise RuntimeError("the engine fell over")
        return WORDS, "stop"

    with pytest.raises(RuntimeError, match="fell over"):
        run_stages(tmp_path, monkeypatch, recipe, dies)
    kept = ids(tmp_path)
    assert len(kept) == 9
    facts, teacher = run_stages(tmp_path, monkeypatch, recipe, lambda ask: (WORDS, "stop"))
    assert facts["made"] == 15 and ids(tmp_path)[:9] == kept
    assert not set(kept) & {ask.id for ask in teacher.asked}


def test_outcomes_other_than_an_answer_are_kept_and_counted(tmp_path, monkeypatch):
    ends = iter(["length"] * 5 + ["prompt_too_long"] * 3 + ["stop"] * 16)

    def reply(ask):
        end = next(ends)
        return ("" if end == "prompt_too_long" else "on and on"), end

    facts, _ = run_stages(tmp_path, monkeypatch, make_recipe(), reply)
    assert (facts["traces"], facts["truncated"], facts["prompt_too_long"]) == (24, 5, 3)
    assert [row["finish_reason"] for row in lines(tmp_path)].count("length") == 5
    assert run_stages(tmp_path, monkeypatch, make_recipe())[0]["made"] == 0


def test_text_survives_whatever_it_is(tmp_path, monkeypatch):
    text = "a\u2028b\x00c\x1b[31m \U0001f600 \ufffd <|im_end|>\n</think>\n\n\\boxed{∞}"
    run_stages(tmp_path, monkeypatch, make_recipe(), lambda ask: (text, "stop"))
    assert {row["text"] for row in lines(tmp_path)} == {text}


def test_parquet_has_the_current_traces_in_the_plans_order(tmp_path, monkeypatch):
    import datasets

    reply = lambda ask: (WORDS, "stop")  # noqa: E731
    run_stages(tmp_path, monkeypatch, make_recipe(seed=1), reply)
    run_stages(tmp_path, monkeypatch, make_recipe(), reply)
    table = datasets.Dataset.from_parquet(
        str(tmp_path / "traces" / "traces.parquet"), cache_dir=str(tmp_path / "cache")
    )
    expected = [(p["id"], k) for p in problems.read_problems(tmp_path / "problems.jsonl") for k in range(2)]
    assert [(row["problem_id"], row["sample"]) for row in table] == expected
    by_id = {row["id"]: row for row in lines(tmp_path)}
    assert [by_id[row["id"]] for row in table] == list(table)

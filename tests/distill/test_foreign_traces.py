"""Traces that others made: layouts, replies, real outputs, and the command alone."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import UserError
from distill.foreign.layouts import named_layout
from distill.foreign.mapping import Reading, Unmapped, samples
from distill.foreign.replies import split
from distill.jsonl import encode_row
from distill.recipe import ForeignTraces
from tests.distill.foreign_rows import (
    ANSWER,
    ANSWERED,
    ASKED,
    R1,
    ROWS,
    SKY,
    THOUGHT,
    imported,
    recipe_of,
    stored,
    write_rows,
)  # fmt: skip

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("named", [True, False])
def test_a_layout_is_read_by_its_name_and_by_its_looks(tmp_path, layout, named):
    source = write_rows(tmp_path / "data.jsonl", [ROWS[layout]])
    recipe = recipe_of(tmp_path, {"source": str(source), "layout": layout if named else "auto"})
    facts, [problem], [trace], manifest = imported(tmp_path / "run", recipe)
    assert (facts["traces"], facts["skipped"], manifest["imported"][0]["layout"]) == (1, 0, layout)
    assert (problem["problem"], trace["problem_id"]) == (ASKED, problem["id"])
    assert (trace["reasoning"], trace["response"]) == (THOUGHT, ANSWER)
    assert problem["answer"] == ("4" if layout in ANSWERED else None)
    assert problem["kind"] == ("math" if layout in ANSWERED else "open")
    assert trace["messages"][-1]["content"].endswith(ASKED) and trace["messages"][-1]["role"] == "user"
    assert trace["finish_reason"] == ("stop" if layout == "open-r1" else "unknown")


@pytest.mark.parametrize("layout", ["messages", "sharegpt", "prompt-response"])
def test_a_reference_in_answer_is_not_left_lying(tmp_path, layout):
    source = write_rows(tmp_path / "data.jsonl", [ROWS[layout] | {"answer": "4"}])
    _, [problem], _, _ = imported(tmp_path / "run", recipe_of(tmp_path, {"source": str(source)}))
    assert (problem["answer"], problem["kind"]) == ("4", "math")


def test_bespoke_stratos_is_openthoughts_layout(tmp_path):
    source = write_rows(tmp_path / "data.jsonl", [ROWS["openthoughts"]])
    recipe = recipe_of(tmp_path, {"source": str(source), "layout": "bespoke-stratos"})
    _, [problem], [trace], _ = imported(tmp_path / "run", recipe)
    assert problem["problem"] == ASKED and trace["response"] == ANSWER
    assert [turn["role"] for turn in trace["messages"]] == ["user"]  # its system prompt explains the marks we replace


def test_messages_in_parts_and_with_the_reasoning_beside(tmp_path):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]},
        {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT},
    ]
    source = write_rows(tmp_path / "data.jsonl", [{"messages": turns}])
    _, [problem], [trace], _ = imported(tmp_path / "run", recipe_of(tmp_path, {"source": str(source)}))
    assert (problem["problem"], trace["reasoning"], trace["response"]) == (ASKED, THOUGHT, ANSWER)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from([R1, "user", "\\boxed{"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "info", "x"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(ROWS)), st.data())
def test_whatever_stands_in_a_field_is_mapped_or_named(layout, data):
    row = ROWS[layout] | {data.draw(st.sampled_from(sorted(ROWS[layout]))): data.draw(JSON)}
    reading = Reading(named_layout(layout, ForeignTraces(source="x")), "x", "cut", None)
    try:
        found = list(samples(reading, "x:1", row))
    except Unmapped as wrong:
        found = [wrong]
    for sample in found:
        if isinstance(sample, Unmapped):
            assert sample.field and sample.reason
        else:
            json.loads(encode_row(sample.problem))
            json.loads(encode_row(sample.trace))
            assert sample.problem["problem"] and sample.trace["messages"][-1]["content"]


def test_where_it_comes_from_is_kept(tmp_path):
    source = write_rows(tmp_path / "data.jsonl", [ROWS["open-r1"]])
    recipe = recipe_of(tmp_path, {"source": str(source), "name": "numina"})
    _, [problem], [trace], manifest = imported(tmp_path / "run", recipe)
    assert problem["source"] == "numina/olympiads"
    assert problem["meta"] | {"source_id": "u1", "licence": "apache-2.0", "problem_type": "Algebra"} == problem["meta"]
    assert trace["teacher"] == "DeepSeek-R1" and trace["meta"]["place"] == f"{source}:1"
    assert trace["meta"]["said"] == {"correct": True, "is_reasoning_complete": True}
    assert "teacher" not in manifest and manifest["imported"][0]["teachers"] == {"DeepSeek-R1": 1}


def test_generations_are_samples_of_one_problem(tmp_path):
    texts = [R1, R1.replace("make", "are"), "<think>\nand so on and on"]
    row = ROWS["open-r1"] | {
        "generations": [*texts, R1], "finish_reasons": ["stop", None, "length", "stop"],
        "correctness_math_verify": [True, True, False, True], "is_reasoning_complete": None,
    }  # fmt: skip
    later = ROWS["open-r1"] | {"problem": f"  {ASKED.lower()} ", "generations": [R1.replace("make", "give")]}
    source = write_rows(tmp_path / "data.jsonl", [row, later])
    facts, problems, traces, _ = imported(tmp_path / "run", recipe_of(tmp_path, {"source": str(source)}))
    assert (facts["traces"], facts["repeats"], len(problems)) == (4, 1, 1)
    assert [t["sample"] for t in traces] == [0, 1, 2, 3]
    assert [t["finish_reason"] for t in traces] == ["stop", "unknown", "length", "stop"]
    assert [t["meta"]["said"]["correct"] for t in traces] == [True, True, False, True]
    assert traces[2]["response"] == "" and len({t["id"] for t in traces}) == 4


def test_own_fields_nested_and_constant(tmp_path):
    row = {"q": {"text": ASKED, "gold": 4.0}, "cot": THOUGHT, "final": ANSWER, "area": "sums", "by": "me", "n": 77}
    source = write_rows(tmp_path / "data.jsonl", [row])
    fields = {
        "problem": "q.text", "answer": "q.gold", "reasoning": "cot", "response": "final", "kind": "area",
        "teacher": "by", "tokens": "n",
    }  # fmt: skip
    recipe = recipe_of(
        tmp_path, {"source": str(source), "fields": fields, "kinds": {"sums": "exact"}, "licence": "cc0-1.0"}
    )
    _, [problem], [trace], _ = imported(tmp_path / "run", recipe)
    assert (problem["answer"], problem["kind"], problem["meta"]["licence"]) == ("4", "exact", "cc0-1.0")
    assert trace["teacher"] == "me" and trace["reasoning_tokens"] + trace["answer_tokens"] == 77


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize(
    ("kind", "reference"),
    [("code", {"asserts": ["assert f(1) == 2"]}), ("choice", {"answer": "B", "options": ["red", "blue"]})],
)
def test_a_reference_in_our_own_form_is_taken_as_it_is(tmp_path, kind, reference, as_text):
    answer = json.dumps(reference) if as_text else reference
    source = write_rows(tmp_path / "data.jsonl", [ROWS["prompt-response"] | {"answer": answer}])
    _, [problem], _, _ = imported(tmp_path / "run", recipe_of(tmp_path, {"source": str(source), "kind": kind}))
    assert (problem["kind"], json.loads(problem["answer"])) == (kind, reference)


def test_code_problems_are_judged_by_their_tests(tmp_path):
    row = json.loads(json.dumps(ROWS["am"]))
    row["messages"][0]["info"] |= {"reference_answer": None, "test_case": {"inputs": ["1"], "outputs": ["2"]}}
    source = write_rows(tmp_path / "data.jsonl", [row])
    _, [problem], _, _ = imported(tmp_path / "run", recipe_of(tmp_path, {"source": str(source)}))
    assert problem["kind"] == "code" and json.loads(problem["answer"]) == {"inputs": ["1"], "outputs": ["2"]}


@pytest.mark.parametrize(
    ("text", "reasoning", "response"),
    [
        (R1, THOUGHT, ANSWER),
        (f"{THOUGHT}</think>{ANSWER}", THOUGHT, ANSWER),
        (SKY, THOUGHT, ANSWER),
        (SKY.removesuffix("<|end_of_solution|>"), THOUGHT, ANSWER),
        (f"<think>{THOUGHT}</think> <answer> {ANSWER} </answer>", THOUGHT, ANSWER),
        (f"think\n{THOUGHT}\nanswer\n{ANSWER}", THOUGHT, ANSWER),
        (f"<|im_start|>think\n{THOUGHT}\n<|im_start|>answer\n{ANSWER}", THOUGHT, ANSWER),
        (f"<thinking>{THOUGHT}</thinking>\n{ANSWER}", THOUGHT, ANSWER),
        (f"<|begin_of_thought|>{THOUGHT}", THOUGHT, ""),
        (f"think\n{THOUGHT}", THOUGHT, ""),
        (THOUGHT, THOUGHT, ""),
    ],
)
def test_where_the_thinking_ends(text, reasoning, response):
    found = split(text)
    assert (found.reasoning, found.response) == (reasoning, response)
    assert ("</think>" in found.text) == bool(response)  # what was cut off while thinking looks it
    assert found.text.count("</think>") <= 1


def test_a_broken_r1_reply_stays_as_it_came_for_the_filters_to_see():
    text = f"<think>{THOUGHT}</think><think>more</think>{ANSWER}"
    assert split(text).text == text


def test_a_reply_without_marks_can_be_an_answer():
    found = split("4, of course.", "answer")
    assert (found.reasoning, found.response) == ("", "4, of course.")


def test_three_lines_of_recipe_filter_a_folder(tmp_path, monkeypatch):
    import datasets

    stored("folder", tmp_path / "x")
    (tmp_path / "mine.yaml").write_text("name: mine\ntraces: {source: x, split: train}\nselection: {per_problem: 2}\n")
    monkeypatch.chdir(tmp_path)
    first = CliRunner().invoke(app, ["filter", "mine.yaml"], catch_exceptions=False)
    assert first.exit_code == 0
    run = tmp_path / "runs" / "mine"
    loaded = datasets.load_dataset(str(run / "dataset"), cache_dir=str(tmp_path / "cache"))
    assert (len(loaded["train"]), len(loaded["validation"])) == (76, 4)
    assert set(loaded["train"]["source"]) == {"x/olympiads"}
    card = (run / "dataset" / "README.md").read_text()
    assert "license: apache-2.0" in card and "| x | x (open-r1) | DeepSeek-R1 | apache-2.0 | 40 | 80 | 0 | 0 |" in card
    before = (run / "verdicts.jsonl").read_bytes()
    again = CliRunner().invoke(app, ["filter", "mine.yaml"], catch_exceptions=False)
    assert "already done, skipped" in again.output and "80/80" not in again.output
    changed = CliRunner().invoke(app, ["filter", "mine.yaml", "filters.repetition.ngram=5"], catch_exceptions=False)
    assert changed.exit_code == 0 and json.loads((run / "manifest.json").read_text())["stages"]["filter"]["judged"]
    identity = json.loads(before.splitlines()[0])["trace_id"]
    told = CliRunner().invoke(app, ["filter", str(run), "--explain", identity], catch_exceptions=False)
    assert f"trace {identity}, sample 0" in told.output and "correctness" in told.output
    trained = CliRunner().invoke(app, ["train", "mine.yaml"])
    assert isinstance(trained.exception, UserError) and "students: the recipe names none" in str(trained.exception)


def test_real_outputs_of_four_models(tmp_path):
    """1,292 replies of R1, QwQ-32B, R1-Distill-Qwen-32B and s1.1-32B to the same 323 problems."""
    if not (DATA / "traces").is_dir():
        pytest.skip("no traces in DISTILL_DATA")
    facts, problems, traces, manifest = imported(
        tmp_path / "run", recipe_of(tmp_path, {"source": str(DATA / "traces"), "licence": "mit"})
    )
    assert (facts["traces"], facts["problems"], facts["skipped"], facts["repeats"]) == (1292, 323, 0, 0)
    assert set(manifest["imported"][0]["teachers"].values()) == {323}
    assert sorted({t["sample"] for t in traces}) == [0, 1, 2, 3]
    s1 = [t for t in traces if t["teacher"] == "s1.1-32B"]
    assert all(t["reasoning"] and t["response"] and "\nanswer\n" not in t["text"] for t in s1)
    # A reply cut off while thinking is the only one without an answer.
    assert sum(not t["response"] for t in traces) == 1
    assert all(re.fullmatch(r"[0-9a-f]{16}", t["id"]) for t in traces) and all(p["answer"] for p in problems)


def test_estimated_tokens_are_near_r1s_own(tmp_path):
    from distill.foreign.mapping import estimate_tokens

    path, packed = DATA / "traces" / "r1_normal.jsonl.gz", DATA / "tokenizers" / "deepseek-r1" / "tokenizer.json.gz"
    if not path.is_file() or not packed.is_file():
        pytest.skip("no traces or tokenizer of R1 in DISTILL_DATA")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(gzip.decompress(packed.read_bytes()).decode())
    texts = [json.loads(line)["response"] for line in gzip.decompress(path.read_bytes()).splitlines()][::10]
    exact = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    assert abs(sum(map(estimate_tokens, texts)) / exact - 1) < 0.1

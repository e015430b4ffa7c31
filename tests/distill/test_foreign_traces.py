"""Traces that others made: layouts, files, what cannot be mapped, an import that was killed, and the command alone."""

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
from distill.foreign import importing
from distill.foreign.layouts import named_layout
from distill.foreign.mapping import Reading, Unmapped, samples
from distill.foreign.replies import split
from distill.jsonl import encode_row
from distill.recipe import ForeignTraces
from distill.recipe_load import load_recipe
from distill.runfolder import RunFolder

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))
THOUGHT, ANSWER = "2 and 2 make 4.", "It is \\boxed{4}."
R1 = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
SKY = (
    f"<|begin_of_thought|>\n\n{THOUGHT}\n\n<|end_of_thought|>\n\n"
    f"<|begin_of_solution|>\n\n{ANSWER}\n\n<|end_of_solution|>"
)
ASKED = "What is 2 + 2?"

ROWS = {
    "open-r1": {
        "problem": ASKED, "solution": "By counting, $\\boxed{4}$.", "answer": "4", "problem_type": "Algebra",
        "question_type": "math-word-problem", "source": "olympiads", "uuid": "u1", "is_reasoning_complete": [True],
        "generations": [R1], "correctness_math_verify": [True], "correctness_llama": None, "finish_reasons": ["stop"],
        "correctness_count": 1, "messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": R1}],
    },
    "openthoughts": {
        "system": "Your role as an assistant involves ...",
        "conversations": [
            {"from": "user", "value": f"Return your final response within \\boxed{{}}. {ASKED}"},
            {"from": "assistant", "value": SKY},
        ],
    },
    "openthoughts-metadata": {
        "problem": ASKED, "deepseek_reasoning": THOUGHT, "deepseek_solution": ANSWER,
        "ground_truth_solution": "So \\boxed{4}", "domain": "math", "source": "numina_math", "test_cases": None,
        "starter_code": None,
    },
    "am": {
        "messages": [
            {"role": "user", "content": ASKED, "info": {
                "source": "OpenMath", "reference_answer": "4", "test_case": None, "think_content": None,
                "answer_content": None}},
            {"role": "assistant", "content": f"<think>{THOUGHT}</think><answer>{ANSWER}</answer>", "info": {
                "source": None, "reference_answer": None, "test_case": None, "think_content": THOUGHT,
                "answer_content": ANSWER}},
        ],
    },
    "s1": {
        "question": ASKED, "solution": "4", "cot_type": "math", "source_type": "AI-MO/NuminaMath-CoT/aops_forum",
        "metadata": "{}", "cot": None, "thinking_trajectories": [THOUGHT], "attempt": ANSWER,
    },
    "s1.1": {
        "question": ASKED, "solution": "4", "cot_type": "math", "source_type": "aime", "metadata": "{}",
        "gemini_thinking_trajectory": "x", "gemini_attempt": "y", "deepseek_thinking_trajectory": THOUGHT,
        "deepseek_attempt": ANSWER, "gemini_grade": "No", "deepseek_grade": "Yes",
    },
    "mip-overthinking": {
        "id": "gsm8k-normal-0", "set": "gsm8k", "kind": "normal", "model": "QwQ-32B", "prompt": ASKED, "answer": "4",
        "solution": "#### 4", "response": f"{THOUGHT}\n</think>\n\n{ANSWER}", "eval_result": None,
    },
    "messages": {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": R1}]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": R1}]},
    "prompt-response": {"prompt": ASKED, "response": R1},
}  # fmt: skip
ANSWERED = {"open-r1", "openthoughts-metadata", "am", "s1", "s1.1", "mip-overthinking"}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(tmp_path, *traces, **more):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"name": "mine", "traces": list(traces), **more}))
    return load_recipe(path)


def imported(folder, recipe):
    with RunFolder.open(folder, recipe) as run:
        facts = importing.run(recipe, run)
        manifest = run.manifest.data
    return facts, read(folder, "problems.jsonl"), read(folder, "traces/traces.jsonl"), manifest


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


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


def many(count=40):
    return [
        ROWS["open-r1"] | {"problem": f"What is {n} + {n}?", "answer": str(2 * n), "uuid": str(n),
                           "generations": [R1.replace("4", str(2 * n)), f"Hm, {n}.\n</think>\n\n\\boxed{{{2 * n}}}"],
                           "finish_reasons": ["stop", "stop"], "is_reasoning_complete": [True, True],
                           "correctness_math_verify": [True, True]}
        for n in range(count)
    ]  # fmt: skip


def stored(kind, folder):
    """The same forty rows in every kind of source."""
    import pyarrow
    from pyarrow import parquet

    rows, text = many(), "".join(json.dumps(row) + "\n" for row in many()).encode()
    folder.mkdir()
    if kind == "jsonl":
        (folder / "data.jsonl").write_bytes(text)
    elif kind == "gz":
        (folder / "data.jsonl.gz").write_bytes(gzip.compress(text))
    elif kind == "zst":
        with pyarrow.CompressedOutputStream(str(folder / "data.jsonl.zst"), "zstd") as file:
            file.write(text)
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet", row_group_size=7)
    elif kind == "folder":
        write_rows(folder / "deep" / "data" / "train-00000.jsonl", rows[:15])
        parquet.write_table(pyarrow.Table.from_pylist(rows[15:]), folder / "deep" / "data" / "train-00001.parquet")
        write_rows(folder / "deep" / "data" / "test-00000.jsonl", rows[:5])
        (folder / "README.md").write_text("about")
        return {"source": str(folder), "split": "train"}
    else:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
        return {"source": str(folder / "saved")}
    return {"source": str(next(folder.iterdir()))}


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "folder", "datasets"])
def test_every_kind_of_source_gives_the_same_traces(tmp_path, kind):
    expected = imported(tmp_path / "a", recipe_of(tmp_path, stored("jsonl", tmp_path / "x")))
    found = imported(tmp_path / "b", recipe_of(tmp_path, stored(kind, tmp_path / "y")))
    assert [t["id"] for t in found[2]] == [t["id"] for t in expected[2]] and len(found[2]) == 80
    assert [p["id"] for p in found[1]] == [p["id"] for p in expected[1]]


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "folder", "datasets"])
def test_a_killed_import_goes_on_and_ends_as_a_quiet_one(tmp_path, kind, monkeypatch):
    recipe = recipe_of(tmp_path, stored(kind, tmp_path / "x"), stored("jsonl", tmp_path / "y") | {"count": 3})
    monkeypatch.setattr(importing, "_FLUSH_ROWS", 4)
    imported(tmp_path / "quiet", recipe)
    real, calls, limits = importing.samples, [], [10**9, 21, 18, 7]

    def dies(how, place, row):
        calls.append(place)
        if len(calls) == limits[-1]:
            raise KeyboardInterrupt
        return real(how, place, row)

    monkeypatch.setattr(importing, "samples", dies)
    while len(limits) > 1:
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            imported(tmp_path / "killed", recipe)
        with open(tmp_path / "killed" / "traces" / "traces.jsonl", "ab") as file:
            file.write(b'{"id": "0123456789abcdef", "problem_id": "')  # as a kill in the middle of a write leaves it
        limits.pop()
    calls.clear()
    imported(tmp_path / "killed", recipe)
    assert 0 < len(calls) < 30  # most was not read again
    for name in ("problems.jsonl", "traces/traces.jsonl", "traces/skipped.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()
    quiet, killed = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("quiet", "killed"))
    assert killed["imported"] == quiet["imported"] and killed["problems"] == quiet["problems"]
    assert not (tmp_path / "killed" / ".import.json").exists()


def test_what_cannot_be_mapped_is_counted_and_named(tmp_path):
    rows = [
        json.dumps(ROWS["open-r1"]),
        "{broken",
        json.dumps(ROWS["open-r1"] | {"generations": [R1 + " ", "", None]}),
        json.dumps(ROWS["open-r1"] | {"problem": 7}),
        json.dumps(ROWS["open-r1"] | {"generations": []}),
        json.dumps(ROWS["open-r1"] | {"problem": "half \ud83d"}),
        "[1]",
    ]
    source = tmp_path / "data.jsonl"
    source.write_text("\n".join(rows))
    facts, _, traces, manifest = imported(tmp_path / "run", recipe_of(tmp_path, {"source": str(source)}))
    skipped = read(tmp_path / "run", "traces/skipped.jsonl")
    assert [(row["place"].rsplit(":", 1)[1], row["field"]) for row in skipped] == [
        ("2", ""), ("3", "generations.1"), ("3", "generations.2"), ("4", "problem"), ("5", "generations"),
        ("6", "problem"), ("7", ""),
    ]  # fmt: skip
    assert "not valid JSON" in skipped[0]["reason"] and skipped[3]["reason"] == "is a int, expected text"
    assert facts["skipped"] == manifest["imported"][0]["skipped"] == 7 and len(traces) == 2


@pytest.mark.parametrize(
    ("row", "wanted", "message"),
    [
        ({"a": 1}, {}, r"data\.jsonl:1: no known layout has the fields a; say in traces\.0\.fields which"),
        (ROWS["open-r1"], {"fields": {"answer": "anwser"}}, r"jsonl:1: the row has no field 'anwser' .*'answer'\?"),
        (ROWS["open-r1"], {"layout": "s1"}, r"data\.jsonl:1: the row has no field 'question'"),
        (ROWS["open-r1"], {"layout": "none"}, r"traces\.0\.fields: name the field"),
        ({"prompt": ASKED, "response": None}, {}, r"jsonl:1: response is null, expected text \(traces\.0: no row"),
        (ROWS["open-r1"], {"tokenizer": "nowhere.json"}, r"nowhere\.json: no such file \(traces\.0\.tokenizer\)"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}, {},
            r"data\.jsonl:1: messages has the turns user, assistant, user before the reply",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_place(tmp_path, row, wanted, message):
    source = write_rows(tmp_path / "data.jsonl", [row])
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "run", recipe_of(tmp_path, {"source": str(source), **wanted}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.jsonl", None, r"no\.jsonl: no such file \(traces\.0\.source\)"),
        ("data.csv", b"a,b", r"data\.csv: expected the name to end in \.jsonl"),
        ("data.parquet", b"PAR?", r"data\.parquet: not a Parquet file"),
        ("data.jsonl.gz", gzip.compress(json.dumps(ROWS["s1"]).encode() * 99)[:-30], r"not a whole gzip file after"),
        ("data.jsonl", b"", r"data\.jsonl: holds no rows \(traces\.0: no row gave a trace\)"),
    ],
)
def test_broken_sources_are_told(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "run", recipe_of(tmp_path, {"source": str(tmp_path / name)}))


def test_evaluation_problems_are_left_out(tmp_path):
    held = write_rows(tmp_path / "eval.jsonl", [{"problem": "what is 3 +  3?", "answer": "6"}])
    source = stored("jsonl", tmp_path / "x")
    recipe = recipe_of(tmp_path, source, evals={"problems": {"source": str(held)}})
    facts, problems, traces, manifest = imported(tmp_path / "run", recipe)
    assert facts["evaluation"] == 2 and len(traces) == 78
    assert "What is 3 + 3?" not in {p["problem"] for p in problems}
    assert manifest["problems"]["dropped"]["overlap"] == 2 and manifest["problems"]["eval"]["count"] == 1


def test_an_import_that_failed_on_its_first_row_starts_again_with_another_mapping(tmp_path):
    row = {"q": "What is 2 + 2?", "t": "<think>\nHm.\n</think>\n\n\\boxed{4}"}
    source = {"source": str(write_rows(tmp_path / "x.jsonl", [row]))}
    with pytest.raises(UserError, match="no known layout"):
        imported(tmp_path / "run", recipe_of(tmp_path, source))
    _, _, traces, _ = imported(
        tmp_path / "run", recipe_of(tmp_path, source | {"fields": {"problem": "q", "text": "t"}})
    )
    assert len(traces) == 1


def test_a_teachers_traces_are_not_overwritten(tmp_path):
    kept = write_rows(tmp_path / "run" / "traces" / "traces.jsonl", [{"id": "x", "problem_id": "y"}])
    before = kept.read_bytes()
    with pytest.raises(UserError, match="were not imported, and would be lost"):
        imported(tmp_path / "run", recipe_of(tmp_path, stored("jsonl", tmp_path / "x")))
    assert kept.read_bytes() == before


def test_another_mapping_imports_anew(tmp_path):
    source = stored("jsonl", tmp_path / "x")
    imported(tmp_path / "run", recipe_of(tmp_path, source))
    _, problems, traces, _ = imported(tmp_path / "run", recipe_of(tmp_path, source | {"kind": "exact", "count": 5}))
    assert len(traces) == 10 and {p["kind"] for p in problems} == {"exact"}


def test_tokens_are_counted_with_a_tokenizer_and_estimated_without(tmp_path):
    from distill.shipped import resolve_model

    source = stored("jsonl", tmp_path / "x")
    _, _, estimated, _ = imported(tmp_path / "a", recipe_of(tmp_path, source))
    tokenizer = str(resolve_model("tiny-r1"))
    _, _, counted, manifest = imported(tmp_path / "b", recipe_of(tmp_path, source | {"tokenizer": tokenizer}))
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    assert manifest["imported"][0]["tokens"] == "counted"
    for guess, trace in zip(estimated, counted, strict=True):
        own = loaded(trace["reasoning"], add_special_tokens=False)["input_ids"]
        assert trace["reasoning_tokens"] == len(own) and guess["id"] == trace["id"]


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

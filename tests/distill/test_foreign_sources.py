"""Importing traces that others made: kinds of files, a killed import, what cannot be mapped, mistakes by place."""

import gzip
import json

import pytest

from distill.errors import UserError
from distill.foreign import importing
from tests.distill.foreign_rows import ASKED, R1, ROWS, imported, read, recipe_of, stored, write_rows


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
    assert "not valid JSON" in skipped[0]["reason"] and skipped[3]["reason"] == "is a number, expected text"
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
        (
            "data.jsonl.gz",
            gzip.compress(json.dumps(ROWS["s1"]).encode() * 99, mtime=0)[:-30],
            r"not a whole gzip file after",
        ),
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

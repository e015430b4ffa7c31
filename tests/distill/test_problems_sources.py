"""Files and `datasets` sources: field mapping, GSM8K as published, and every unusable row named."""

import gzip
import json
import math
import os
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.problem_sources import source_problems
from distill.problems import build_problems
from distill.recipe import ProblemSource
from tests.distill.small_run import problem

DATA = Path(os.environ.get("DISTILL_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
GSM8K = [
    {"question": "Natalia sold clips.", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 72"},
    {"question": "A house costs?", "answer": "Half is 575.\n#### 1,150,000"},
    {"question": "How cold?", "answer": "#### -5"},
]


def write_lines(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def read(source, **fields):
    return list(source_problems(ProblemSource(source=str(source), **fields), "problems"))


def test_gsm8k_as_published(tmp_path):
    problems = read(write_lines(tmp_path / "train.jsonl", GSM8K), problem="question", answer="answer")
    assert [p["answer"] for p in problems] == ["72", "1150000", "-5"]
    assert [p["kind"] for p in problems] == ["math"] * 3
    assert problems[0]["problem"] == "Natalia sold clips." and problems[0]["source"] == "train.jsonl"
    assert problems[0]["meta"]["family"] == "train"


def test_jsonl_gz_parquet_folder_and_saved_dataset_agree(tmp_path):
    import datasets
    import pyarrow
    from pyarrow import parquet

    rows = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n), "level": n} for n in range(20)]
    plain = write_lines(tmp_path / "p.jsonl", rows)
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as file:
        file.write(Path(plain).read_text())
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "train.jsonl", rows)
    expected = [(p["id"], p["problem"], p["answer"], p["meta"]["level"]) for p in read(plain)]
    assert len(expected) == 20
    for name in ("z.jsonl.gz", "q.parquet", "saved", "folder"):
        assert [(p["id"], p["problem"], p["answer"], p["meta"]["level"]) for p in read(tmp_path / name)] == expected


def test_a_datasets_folder_with_several_splits_needs_a_name(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"problem": "a", "answer": "1"}])
    write_lines(tmp_path / "test.jsonl", [{"problem": "b", "answer": "2"}])
    assert [p["problem"] for p in read(tmp_path, split="test")] == ["b"]
    with pytest.raises(UserError, match=r"problems\.split: .* has the splits train, test; name one"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, test"):
        read(tmp_path, split="dev")


def test_dotted_and_indexed_fields_numbers_and_ids(tmp_path):
    row = {"messages": [{"content": "What is 6 * 7?"}], "reward": {"truth": 42.0}, "extra.key": "x", "uid": 9}
    path = write_lines(tmp_path / "p.jsonl", [row])
    [one] = read(path, problem="messages.0.content", answer="reward.truth", id="uid", kind="exact")
    assert (one["problem"], one["answer"], one["kind"], one["meta"]["source_id"]) == (
        "What is 6 * 7?",
        "42",
        "exact",
        "9",
    )
    assert read(path, problem="extra.key", answer=None)[0]["problem"] == "x"


def test_answers_may_be_missing_on_purpose(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"problem": "a", "answer": None}, {"problem": "b", "answer": " "}])
    assert [p["answer"] for p in read(path)] == [None, None]


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"problem": "a", "answer": "1"}, "{oops"], {}, r"p\.jsonl:2: the line is not valid JSON"),
        ([{"problem": "a", "answer": "1"}, '["a list"]'], {}, r"p\.jsonl:2: expected a JSON object"),
        ([{"question": "a", "answer": "1"}], {}, r"p\.jsonl:1: the row has no field 'problem' \(problems\.problem\)"),
        ([{"problems": "a"}], {}, "did you mean 'problems'"),
        ([{"problem": "a"}], {}, r"p\.jsonl:1: the row has no field 'answer' \(problems\.answer\); it has problem"),
        ([{"problem": " ", "answer": "1"}], {}, r"p\.jsonl:1: the field 'problem' \(problems\.problem\) is empty"),
        ([{"problem": None, "answer": "1"}], {}, r"p\.jsonl:1: the field 'problem' .* is empty"),
        (
            [{"problem": "a", "answer": ["1"]}],
            {},
            r"p\.jsonl:1: the field 'answer' .* is a list, expected text or a number",
        ),
        ([{"problem": "a", "answer": True}], {}, "is a bool"),
        ([{"problem": "a", "answer": math.nan}], {}, r"p\.jsonl:1: the field 'answer' .* is nan, expected"),
        ([{"problem": "a", "answer": math.inf}], {}, r"p\.jsonl:1: the field 'answer' .* is inf, expected"),
        ([{"problem": "a \ud800", "answer": "1"}], {}, r"p\.jsonl:1: the field 'problem' .* half a surrogate pair"),
        ([{"problem": "a", "x": [1]}], {"answer": "x.3"}, r"no field 'x\.3'"),
    ],
)
def test_unusable_rows_are_named_by_file_line_and_field(tmp_path, rows, fields, message):
    path = write_lines(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError, match=message):
        read(path, **fields)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, r"none\.jsonl: no such file \(problems\.source\)"),
        ("p.txt", b"x", r"p\.txt: expected the name to end in \.jsonl"),
        ("p.parquet", b"not parquet", r"p\.parquet: not a Parquet file"),
        ("p.jsonl.gz", b"not gzip", r"p\.jsonl\.gz: not a whole gzip file"),
        (
            "p.jsonl.gz",
            gzip.compress(b'{"problem": "a", "answer": "1"}\n' * 99, mtime=0)[:-12],
            "not a whole gzip file",
        ),
        ("p.jsonl", b'{"problem": "\xff\xfe", "answer": "1"}\n', r"p\.jsonl:1: the line is not UTF-8"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_folder_without_data_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"problems\.source: `datasets` cannot load .*empty"):
        read(tmp_path / "empty")


def test_a_folder_that_does_not_parse_says_why(tmp_path, capfd):
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train.jsonl", [{"problem": "a", "answer": {"b": 1}}, {"problem": 1}, "{oops"])
    with pytest.raises(UserError, match=r"problems\.source: `datasets` cannot load .*data': (?!An error occurred)"):
        read(tmp_path / "data")
    assert "Generating" not in capfd.readouterr().err


def build(path, exclude=(), **fields):
    return build_problems(ProblemSource(source=str(path), **fields), "problems", "train", exclude)


def test_an_empty_set_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no problems for 'problems': the source is empty"):
        build(write_lines(tmp_path / "p.jsonl", []))
    path = write_lines(tmp_path / "q.jsonl", [{"problem": "A?", "answer": "1"}])
    with pytest.raises(UserError, match="all 1 are evaluation problems"):
        build(path, exclude=[problem("a?")])


def test_repeats_and_evaluation_problems_are_dropped_and_counted(tmp_path):
    rows = [{"problem": text, "answer": "1"} for text in ("A?", "a? ", "B?", "C?", "Ｃ?")]
    problems, dropped = build(write_lines(tmp_path / "p.jsonl", rows), exclude=[problem("b?")])
    assert [p["problem"] for p in problems] == ["A?", "C?"]
    assert dropped == {"overlap": 1, "repeats": 2}


def test_a_choice_of_count_is_seeded_and_stable_under_edits(tmp_path):
    rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(200)]
    path = write_lines(tmp_path / "p.jsonl", rows)
    chosen = {p["id"] for p in build(path, count=50, seed=3)[0]}
    assert len(chosen) == 50
    assert chosen == {p["id"] for p in build(path, count=50, seed=3)[0]}
    assert chosen != {p["id"] for p in build(path, count=50, seed=4)[0]}
    assert chosen < {p["id"] for p in build(path, count=51, seed=3)[0]}
    edited = write_lines(tmp_path / "q.jsonl", [{**rows[0], "problem": "Something else?"}, *rows[1:]])
    assert len(chosen ^ {p["id"] for p in build(edited, count=50, seed=3)[0]}) <= 2


def test_more_than_there_is_is_an_error(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"problem": "a", "answer": "1"}] * 3)
    with pytest.raises(UserError, match=r"problems\.count: 5 problems asked of .* has 1 \(2 repeats"):
        build(path, count=5)


@pytest.mark.skipif(not (DATA / "benchmarks").is_dir(), reason="no real benchmark files (DISTILL_DATA)")
def test_real_gsm8k_train_and_test_do_not_overlap():
    evaluation, _ = build(DATA / "benchmarks" / "gsm8k_test.jsonl")
    train, dropped = build(DATA / "benchmarks" / "gsm8k_train.jsonl.gz", exclude=evaluation)
    assert len(evaluation) == 1319 and len(train) + dropped["overlap"] + dropped["repeats"] == 7473
    assert not {p["id"] for p in train} & {p["id"] for p in evaluation}
    assert all(p["answer"] and "," not in p["answer"] for p in train)

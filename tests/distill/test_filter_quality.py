"""The filters on the labelled sample (tests/data) are no worse than measured; the sample is what its script makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import beyond
from tests.data import make_labelled_problems as making_problems
from tests.data import make_labelled_traces as making
from tests.data.labelled import judge, read_sample, score

# Filter: (rejected rightly at least, rejected wrongly at most, passed wrongly at most).
MEASURED = {
    "truncation": (15, 0, 2),
    "format": (39, 0, 2),
    "correctness": (34, 12, 0),
    "repetition": (11, 0, 3),
    "language": (24, 2, 0),
    "readability": (9, 0, 4),
    "near_duplicates": (50, 0, 0),
}


@pytest.fixture(scope="module")
def rows():
    return read_sample()


def test_the_sample_is_large_enough_and_says_where_it_is_from(rows):
    real = [row for row in rows if not row["base"]]
    assert len(rows) >= 120 and len(real) >= 60 and len({row["id"] for row in rows}) == len(rows)
    assert {row["model"] for row in real} == set(making.MODELS)
    assert all(row["licence"] and row["source"] and row["answer"] for row in rows)
    assert {name for row in rows for name in row["fails"]} == set(making.JUDGED)
    assert {row["base"] for row in rows if row["base"]} <= {row["id"] for row in real}


def test_filters_are_no_worse_than_measured(rows):
    found = score(rows, judge(rows, {}))
    for name, (hits, false_alarms, missed) in MEASURED.items():
        counts = found[name]
        now = (len(counts.hits), len(counts.false_alarms), len(counts.missed))
        assert now[0] >= hits and now[1] <= false_alarms and now[2] <= missed, (name, now, vars(counts))


def test_a_laxer_run_misses_single_foreign_words(rows):
    found = score(rows, judge(rows, {"language": {"max_run": 2}}))["language"]
    assert (len(found.hits), len(found.false_alarms), len(found.missed)) == (15, 2, 9), vars(found)


def test_every_bad_trace_but_known_ones_is_rejected_by_some_filter(rows):
    verdicts = judge(rows, {})
    del verdicts["near_duplicates"]  # a copy is rejected for being one
    passed = [row for n, row in enumerate(rows) if row["fails"] and all(said[n].passed for said in verdicts.values())]
    assert {row["id"] if not row["base"] else row["fault"] for row in passed} <= {
        "R1/gsm8k-normal-381", "s1.1/gsm8k-normal-148", "a loop with a number that counts",
        "code without a fence", "a turn of the user made up", "a role's name",
    }  # fmt: skip


def test_evaluation_problems_are_found_in_disguise_and_training_problems_are_left():
    found, parts = beyond.score_decontamination()
    assert len(found.hits) >= 78 and len(found.false_alarms) <= 1, (found.false_alarms, found.missed)
    sure = ("the same", "capitals, blanks, typesetting", "an instruction around it", "other numbers", "other names")
    assert not any(parts[part].missed for part in (*sure, "the second part of a longer exercise"))
    assert len(parts["random"].passed) == 100
    # Known to be beyond it: half a problem, and the same problem in other words.
    assert not parts["its first half"].hits and not parts["other words, by hand"].hits


def test_the_majority_and_the_median_are_no_worse_than_measured():
    found = beyond.score_agreement()
    assert len(found.hits) >= 34 and len(found.false_alarms) <= 17 and len(found.missed) <= 28, vars(found)
    found, rounds = beyond.score_outliers()
    assert len(found.false_alarms) <= 12 and len(found.hits) >= 53, vars(found)
    assert len(rounds["16 times"].hits) > len(rounds["3 times"].hits)


@pytest.mark.skipif(not making.DATA.exists(), reason="the real traces are not here (DISTILL_DATA)")
def test_the_scripts_make_the_committed_samples(rows):
    assert list(making.labelled()) == rows
    assert list(making_problems.labelled_problems()) == beyond.read("labelled_problems")
    assert list(making_problems.labelled_samples()) == beyond.read("labelled_samples")


def test_the_measurement_prints_and_writes_its_figures(tmp_path: Path):
    command = [sys.executable, "-m", "tests.bench.filter_quality", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "precision" in done.stdout and "label:" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["all"]["near_duplicates"]["recall"] == 1

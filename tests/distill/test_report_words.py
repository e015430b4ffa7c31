"""The sentences and charts of the report: what they say for every way that a run can come out."""

import re
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.report import charts, words
from distill.report.curves import MOST_POINTS, read_curve, thin


def student(name: str, *pairs: tuple[str, float, float, float]) -> dict[str, Any]:
    """A student with (baseline, difference, low, high) for each baseline."""
    score = {"mean": 0.1, "ci95": [0.05, 0.15], "min_detectable_diff": 0.03, "higher": 5, "lower": 3}
    baselines = [{"name": b, "paired_diff": d, "paired_ci95": [low, high], **score} for b, d, low, high in pairs]
    return {"name": name, "mean": 0.5, "ci95": [0.45, 0.55], "baselines": baselines}


WINS = (("base", 0.4, 0.35, 0.45), ("answers_only", 0.1, 0.05, 0.15))
LEVEL = (("base", 0.4, 0.35, 0.45), ("answers_only", 0.01, -0.02, 0.04))
LOSES = (("base", -0.1, -0.15, -0.05), ("answers_only", 0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("students", "said"),
    [
        ([], "No student has been evaluated yet."),
        ([student("a")], "No student was compared with a baseline."),
        ([student("a", *WINS)], "Fine-tuned on traces, a beats every baseline."),
        ([student("a", *WINS), student("b", *WINS)], "Fine-tuned on traces, a and b beat every baseline."),
        (
            [student("a", *WINS), student("b", *LEVEL)],
            "a beats every baseline; b beats its base but not answers-only training.",
        ),
        ([student("a", *LOSES)], "a beats no baseline."),
        ([student("a", *LOSES), student("b", *LOSES)], "No student beats any baseline."),
    ],
)
def test_headline(students: list[dict[str, Any]], said: str) -> None:
    assert words.headline({"students": students}) == said


def test_interval_with_zero_is_never_a_win() -> None:
    for low, high in ((-0.01, 0.05), (0.0, 0.05), (-0.05, 0.0), (0.0, 0.0)):
        baseline = student("a", ("base", (low + high) / 2, low, high))["baselines"][0]
        assert words.outcome(baseline) == "level"
        assert "not distinguishable" in words.against(baseline) and "includes zero" in words.against(baseline)
        assert "3.0 points or more would be found" in words.against(baseline)


def test_same_score_on_every_problem() -> None:
    baseline = student("a", ("base", 0.0, 0.0, 0.0))["baselines"][0] | {
        "higher": 0,
        "lower": 0,
        "min_detectable_diff": 0.0,
    }
    assert words.against(baseline) == "no different from its untouched base: both score the same on every problem"


def test_a_loss_is_called_one() -> None:
    said = words.student_sentences(student("a", *LOSES), {"mean": 0.8})
    assert "50.0% correctly (95% interval 45.0 to 55.0), 62.5% of what its teacher reaches (80.0%)" in said[0]
    assert said[1] == "It is 10.0 points below its untouched base (−15.0 to −5.0; the interval excludes zero)."


def test_teacher_that_was_not_measured_or_scored_nothing_is_no_divisor() -> None:
    for teacher in (None, {"mean": None}, {"mean": 0.0}):
        assert words.student_sentences(student("a", *WINS), teacher)[0].endswith("45.0 to 55.0).")


def test_numbers() -> None:
    assert [words.percent(x) for x in (0, 1, 0.1234, None)] == ["0.0%", "100.0%", "12.3%", "–"]
    assert [words.percent(x) for x in (0.00001, 0.99999)] == ["<0.1%", ">99.9%"]
    assert [words.points(x) for x in (0.1234, -0.05, -0.0001)] == ["+12.3", "−5.0", "0.0"]
    assert [words.short_count(x) for x in (0, 999, 1234, 5_600_000, 7e9)] == ["0", "999", "1.23k", "5.6M", "7B"]
    assert [words.duration(x) for x in (0.84, 52.3, 59.7)] == ["0.8 s", "52 s", "1 min 0 s"]
    assert [words.duration(x) for x in (192, 7500)] == ["3 min 12 s", "2 h 5 min"]


@pytest.mark.parametrize("values", [[], [0.0], [0.93], [-0.2, 0.4], [3.2e-5], [1e9, 5.0], [-7.0]])
def test_axis_holds_its_values_and_zero(values: list[float]) -> None:
    for tight in (False, True):
        axis = charts.nice_axis(values, at_least=1e-6, tight=tight)
        assert axis.low <= min([0.0, *values]) and axis.high >= max([0.0, *values])
        assert 2 <= len(axis.ticks) <= 8 and 0.0 in axis.ticks
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


def test_whisker_lies_where_its_numbers_are() -> None:
    svg = charts.whisker("student", 0.5, [0.25, 0.75], charts.UNIT, 'label with "quotes" <b>')
    assert 'class="whisker" x1="25.00%" x2="75.00%"' in svg
    assert re.search(r'x="50.00%" y="50%"><path class="mark"', svg)
    assert "<b>" not in svg and "style=" not in svg


def test_line_goes_through_its_points() -> None:
    axis = charts.Axis(0.0, 2.0, (0.0, 1.0, 2.0))
    svg = charts.lines([charts.Line("student", [(0, 2.0), (50, 1.0), (100, 0.0)])], 100, axis, "loss")
    assert 'points="0.0,0.0 500.0,500.0 1000.0,1000.0"' in svg


def test_thinning_keeps_the_mean_and_the_end() -> None:
    points = [(float(x), float(x % 7)) for x in range(2100)]
    thinned, size = thin(points)
    assert len(thinned) <= MOST_POINTS and size == 7 and thinned[-1][0] == 2099
    assert all(y == 3.0 for _, y in thinned)
    assert thin([]) == ([], 1)


def test_training_log_with_a_torn_end_and_a_diverged_loss(tmp_path: Path) -> None:
    path = tmp_path / "training_log.jsonl"
    rows = [
        '{"step": 1, "tokens": 10, "loss": 2.0, "lr": 0.1}',
        '{"step": 2, "tokens": 20, "loss": NaN}',
        '{"step": 3, "tok',
    ]
    path.write_text("\n".join(rows))
    curve = read_curve(path, "a")
    assert curve.loss == [(10.0, 2.0)] and curve.steps == 2 and curve.tokens == 20
    path.write_text('{"step": 1\n{"step": 2, "tokens": 20}\n')
    with pytest.raises(UserError, match=r"training_log\.jsonl:1"):
        read_curve(path, "a")

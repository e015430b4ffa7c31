"""What the report says of how traces were made: of finished runs, of runs under way, of old runs and foreign traces."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.generation.past import generation as facts_of
from distill.generation.record import Record
from distill.generation.throughput import Amount
from distill.report import words
from distill.report.generation import generation
from distill.results import build
from tests.distill.fake_run import make_run
from tests.distill.test_report_page import load_recipe, make_report

A, B = "http://gpu-1:8000/v1", "http://gpu-2:8000/v1"


def priced(folder: Path) -> list[dict]:
    """A run whose traces came from two endpoints at a price, with accounts beside them, killed before the end."""
    make_run(folder, stages=("problems", "traces", "filter"))
    path = folder / "traces" / "traces.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"endpoint": (A, B)[number % 2], "cost": 0.5, "attempts": 1 + (number < 3), "seconds": 0.5}
    rows[0]["finish_reason"] = "<i>content_filter"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = Record(starts=2, wall_seconds=100.0, gpu_seconds=1600.0, failed=Counter(timeout=4), failed_cost=6.0)
    record.errors = {A: Counter({"timeout": 31, "<i>http_500": 9})}
    for second in range(100):
        record.throughput.count(second, Amount(second % 3, 10, 50 * (second % 3)))
    record.save(folder / "traces" / "accounts.json")
    set_stage(folder, status="running")
    return rows


def set_stage(folder: Path, **entries) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["traces"].update(entries)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def without_accounts(folder: Path) -> None:
    (folder / "traces" / "accounts.json").unlink()


def results(folder: Path) -> dict:
    recipe = load_recipe(str(folder / "recipe.yaml"), [])
    return build(recipe, folder, json.loads((folder / "manifest.json").read_text()))


def test_a_run_under_way_is_summed_up_from_its_lines_and_accounts(tmp_path):
    rows = priced(tmp_path / "run")
    found = results(tmp_path / "run")
    facts = found["generation"]
    accepted = found["funnel"][-1]["out"]
    assert facts["finished"] == len(rows) and facts["accepted"] == accepted
    assert facts["cost"] == 0.5 * len(rows) + 6 and facts["gpu_hours"] == pytest.approx(1600 / 3600, abs=1e-6)
    assert facts["per_accepted"]["cost"] == facts["cost"] / accepted
    assert facts["per_finished"]["wall_seconds"] == 100 / len(rows)
    assert facts["latency"]["p99"] == pytest.approx(0.5, rel=0.03) and facts["retried"] == 3
    assert facts["endpoints"][A]["finished"] == len(rows) / 2 and facts["endpoints"][B]["errors"] == {}


def test_the_page_tells_costs_endings_errors_endpoints_and_speed(tmp_path):
    priced(tmp_path / "run")
    html = make_report(tmp_path / "run")
    section = html[html.index('<section id="generation"') : html.index('<section id="funnel"')]
    assert '<a href="#generation">' in html and "<i>" not in section
    said = " ".join(re.sub(r"<[^>]+>", " ", section).split())
    assert "120 samples finished in 1 min 40 s, over 2 starts. Half of them took at most" in said
    assert "3 took more than one attempt. Samples were given up 4 times" in said
    assert "price 66.00 0.55" in said and "GPU-hours 0.44 0.0037" in said
    assert "&lt;i&gt;content_filter 1 0.8%" in said and "timeout 31 77.5%" in said and "gpu-1:8000 60" in said
    assert section.count("<polyline") == 2 and "across: seconds of generation" in said


def test_a_finished_stage_is_told_by_its_manifest_alone(tmp_path):
    priced(tmp_path / "run")
    facts = results(tmp_path / "run")["generation"]
    set_stage(tmp_path / "run", status="done", generation={**facts, "finished": 7, "endpoints": {}})
    found = results(tmp_path / "run")
    assert found["generation"]["finished"] == 7
    assert generation(found)["endpoints"] == []


def test_runs_from_before_there_were_accounts_still_report(tmp_path):
    without_accounts(make_run(tmp_path / "run"))
    found = results(tmp_path / "run")
    section = generation(found)
    assert section["sentence"].startswith("120 samples finished in 1 min 2 s. Half of them took at most")
    assert [row["name"] for row in section["rows"]] == ["prompt tokens", "generated tokens", "time"]
    assert (section["chart"], section["errors"], section["endpoints"]) == (None, [], [])
    assert [row["name"] for row in section["outcomes"]] == ["stop", "length"]


def test_foreign_traces_have_no_times(tmp_path):
    without_accounts(make_run(tmp_path / "run", stages=("problems", "traces")))
    path = tmp_path / "run" / "traces" / "traces.jsonl"
    rows = [json.loads(line) | {"seconds": 0.0, "prompt_tokens": 0} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = generation(results(tmp_path / "run"))
    assert section["sentence"] == "120 samples finished."
    assert [row["name"] for row in section["rows"]] == ["generated tokens"] and not section["accepted"]


def test_traces_without_a_verdict_are_of_an_older_recipe(tmp_path):
    rows = priced(tmp_path / "run")
    with open(tmp_path / "run" / "traces" / "traces.jsonl", "a") as file:
        file.write(json.dumps({**rows[0], "id": "stale"}) + "\n")
    assert results(tmp_path / "run")["generation"]["finished"] == len(rows)


def test_no_traces_no_section_and_a_broken_line_is_named(tmp_path):
    make_run(tmp_path / "run", stages=("problems",))
    assert facts_of(tmp_path / "run", {}, None) is None
    assert generation({"generation": None}) is None
    path = tmp_path / "run" / "traces" / "traces.jsonl"
    path.parent.mkdir()
    path.write_text("[]\n")
    with pytest.raises(UserError, match=r"traces.jsonl:1"):
        facts_of(tmp_path / "run", {}, None)


def test_the_last_step_of_the_chart_ends_when_generation_did(tmp_path):
    facts = results(make_run(tmp_path / "run"))["generation"]
    # Ten samples a second until 9.5 s: the last second, only half there, must not look like a slump.
    amounts = [10] * 9 + [5]
    throughput = {"step_seconds": 1.0, "finished": amounts, "prompt_tokens": amounts, "completion_tokens": amounts}
    drawn = generation({"generation": {**facts, "throughput": throughput, "wall_seconds": 9.5}})["chart"]
    heights = {point.split(",")[1] for point in re.search(r'points="([^"]+)"', str(drawn["samples"])).group(1).split()}
    assert heights == {"0.0"} and drawn["top"] == "10" and drawn["unit"] == "seconds"


def test_words_of_small_things():
    assert [words.brief_seconds(s) for s in (None, 0.0137, 0.9996, 1.366, 59.4, 60)] == [
        "–", "13.7 ms", "1 s", "1.37 s", "59.4 s", "1 min 0 s",
    ]  # fmt: skip
    assert [words.amount(x) for x in (None, 0, 1234.5, 0.42, 0.0123, 0.00037, 2.1e-6)] == [
        "–", "0", "1,234.50", "0.42", "0.012", "0.00037", "2.1e-06",
    ]  # fmt: skip

"""The stage on more than one process, killed and resumed, replayed, explained: always the ledger of one quiet run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from distill import filtering, judging
from distill.errors import UserError
from distill.explain import explain
from distill.filters import COMPARING
from distill.filters import ORDER as ALL
from distill.lines import Lines, StoredProblems, key
from distill.workers import Workers
from tests.distill.small_run import make_recipe, open_run, problem, trace
from tests.distill.test_filters_stage import count_checks, ledger, tree

ORDER = tuple(name for name in ALL if name != "quality")  # which asks a model
EVERY = {
    name: {} for name in ("format", "length", "repetition", "language", "readability", "reflection", *COMPARING)
} | {"correctness": {"without_reference": "pass"}}  # fmt: skip


SYLLABLES = [
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "ha",
    "je",
    "ki",
    "lo",
    "mu",
    "na",
    "pe",
    "qui",
    "ro",
    "su",
    "ta",
    "ve",
    "wi",
]


def make_folder(folder, problems=12, samples=5):
    """Traces of many kinds, half of the problems without a reference, and the recipe that names every filter."""
    (folder / "traces").mkdir(parents=True)
    bench = folder.with_name("bench.jsonl")
    asked, rows = [], []
    pick = random.Random(0)
    for number in range(problems):
        things = [f"{pick.choice(SYLLABLES)}{pick.choice(SYLLABLES)}" for _ in range(8)]
        text = (
            f"Farmer {things[0]} has {number} of {', '.join(things[1:6])} and {things[6]} eats {things[7]}. How many?"
        )
        of = problem(text, None if number % 2 else str(number))
        asked.append(of)
        for sample in range(samples):
            thinking = f"Let me count the {things[sample]} of farmer {things[0]}. " * (1 + 30 * (sample == 4))
            thinking += ["So it is so.", "Wait, let me check that.", "让我重新检查一下这个计算。"][
                (number + sample) % 3
            ]
            if (number, sample) == (4, 1):
                thinking = rows[-1]["reasoning"]
            answer = number if sample != 2 else 99
            end = "length" if (number, sample) == (3, 3) else "stop"
            rows.append(trace(of, f"{thinking}\n</think>\n\nIt is \\boxed{{{answer}}}.", sample, end))
    bench.write_text(json.dumps({"problem": asked[2]["problem"], "answer": "1"}) + "\n")
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "traces" / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_recipe(filters=EVERY | {"decontamination": {"against": [{"source": str(bench)}]}})


def stage(folder, recipe, **settings):
    with open_run(folder, recipe) as run:
        return filtering.run(recipe, run, **settings)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """(folder, recipe) of one undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("quiet") / "run"
    recipe = make_folder(folder)
    stage(folder, recipe, workers=1)
    return folder, recipe


def copied(quiet, tmp_path):
    """Problems and traces of the quiet run, without what was made of them."""
    folder = tmp_path / "run"
    (folder / "traces").mkdir(parents=True)
    for name in ("problems.jsonl", "traces/traces.jsonl"):
        (folder / name).write_bytes((quiet[0] / name).read_bytes())
    return folder


def same(folder, quiet):
    names = ("verdicts.jsonl", "funnel.json", "filter_examples.json", "contamination.jsonl")
    assert not list(folder.glob(".verdicts*"))
    return tree(folder / "dataset") == tree(quiet[0] / "dataset") and all(
        (folder / name).read_bytes() == (quiet[0] / name).read_bytes() for name in names
    )


def test_every_filter_has_something_to_say(quiet):
    rows = ledger(quiet[0])
    assert tuple(rows[0]["verdicts"]) == ORDER
    failed = {name for row in rows for name, verdict in row["verdicts"].items() if not verdict["pass"]}
    assert {"truncation", "decontamination", "correctness", "language", "repetition", "agreement"} <= failed
    assert any(row["accepted"] for row in rows)
    assert rows[0]["verdicts"]["reflection"]["measured"].keys() >= {"wait", "check", "per_1000_words"}


def test_two_processes_write_what_one_does(quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "BATCH_ROWS", 7)
    folder = copied(quiet, tmp_path)
    stage(folder, quiet[1], workers=2)
    assert same(folder, quiet)


def test_a_replay_judges_what_changed_only_and_equals_a_fresh_run(quiet, tmp_path, monkeypatch):
    folder, fresh = copied(quiet, tmp_path / "a"), copied(quiet, tmp_path / "b")
    stage(folder, quiet[1])
    changed = quiet[1].model_copy(deep=True)
    changed.filters.near_duplicates.similarity = 0.95
    changed.filters.language.max_run = 100
    changed.filters.language.min_share = 0.0
    checks = count_checks(monkeypatch)
    stage(folder, changed)
    # Comparing filters are judged anew because other traces pass before them.
    assert set(checks) <= {"language", *COMPARING} and checks["language"] == 60
    monkeypatch.undo()
    stage(fresh, changed)
    assert (folder / "verdicts.jsonl").read_bytes() == (fresh / "verdicts.jsonl").read_bytes()
    assert tree(folder / "dataset") == tree(fresh / "dataset")


def test_a_comparing_filter_is_not_judged_again_when_what_it_saw_is_the_same(quiet, tmp_path, monkeypatch):
    folder = copied(quiet, tmp_path)
    stage(folder, quiet[1])
    changed = quiet[1].model_copy(deep=True)
    changed.filters.readability.max_paragraph_words = 399
    checks = count_checks(monkeypatch)
    assert stage(folder, changed)["judged"] == 60 and set(checks) == {"readability"}
    rows, before = ledger(folder), ledger(quiet[0])
    assert [row["verdicts"]["near_duplicates"] for row in rows] == [r["verdicts"]["near_duplicates"] for r in before]


def test_an_edited_trace_is_judged_again(quiet, tmp_path, monkeypatch):
    folder = copied(quiet, tmp_path)
    stage(folder, quiet[1])
    path = folder / "traces" / "traces.jsonl"
    first, rest = path.read_text().split("\n", 1)
    row = json.loads(first)
    row["response"] = row["text"] = "No answer at all"  # the same id: somebody else's file may be edited so
    path.write_text(json.dumps(row) + "\n" + rest)
    checks = count_checks(monkeypatch)
    stage(folder, quiet[1])
    assert checks["correctness"] == checks["repetition"] == 1
    assert not ledger(folder)[0]["accepted"]


def test_a_stage_that_fails_midway_goes_on_from_there(quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "BATCH_ROWS", 10)
    folder = copied(quiet, tmp_path)
    done = []

    def failing(task, items, judge=judging.judge):
        if len(done) == 3:
            raise OSError(28, "No space left on device")
        done.append(len(items))
        return judge(task, items)

    for kills in range(3):
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(filtering, "judge", failing)
            with pytest.raises(OSError, match="No space"):
                stage(folder, quiet[1])
        assert not (folder / "verdicts.jsonl").exists()
        assert len(list(folder.glob(".verdicts*.partial"))) == kills + 1
    checks = count_checks(monkeypatch)
    stage(folder, quiet[1])
    assert checks["repetition"] == 30  # the other 30 were found in what was left behind
    assert same(folder, quiet)


def test_killed_with_its_workers_and_run_again(tmp_path):
    folder = tmp_path / "run"
    recipe = make_folder(folder, problems=600)
    code = (
        "import sys; from pathlib import Path; from distill import filtering, judging; from tests.distill.small_run "
        "import make_recipe, open_run; judging.BATCH_ROWS = 50; recipe = make_recipe(filters=eval(sys.argv[2]))\n"
        "with open_run(Path(sys.argv[1]), recipe) as run: filtering.run(recipe, run, workers=2)"
    )
    filters = repr(recipe.filters.model_dump(exclude_none=True))
    child = subprocess.Popen([sys.executable, "-c", code, str(folder), filters], start_new_session=True)
    deadline = time.monotonic() + 120
    partial = folder / ".verdicts.0.partial"
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > 50_000):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert partial.exists() and not (folder / "verdicts.jsonl").exists()
    with open(partial, "ab") as file:
        file.write(b'{"trace_id": "torn')
    kept = partial.read_bytes().count(b"\n")
    facts = stage(folder, recipe, workers=1)
    # Nine filters judge single traces; the five that compare see all 3,000 at the end.
    assert facts["judged"] == (3000 - kept) * 9 + 3000 * 5
    assert len(ledger(folder)) == 3000 and not list(folder.glob(".verdicts*"))


def test_examples_of_every_filter(quiet):
    examples = json.loads((quiet[0] / "filter_examples.json").read_text())
    assert tuple(examples) == ORDER
    assert len(examples["language"]["rejected"]) == 5 and examples["language"]["accepted"]
    rows = {row["trace_id"]: row for row in ledger(quiet[0])}
    for name, found in examples.items():
        for verdict, shown in found.items():
            for example in shown:
                row = rows[example["trace_id"]]
                assert example["reason"] == row["verdicts"][name]["reason"] and example["excerpt"]
                assert row["accepted"] if verdict == "accepted" else not row["verdicts"][name]["pass"]


def test_explain(quiet):
    rows = ledger(quiet[0])
    row = next(row for row in rows if not row["verdicts"]["decontamination"]["pass"])
    lines = list(explain(quiet[1], quiet[0], row["trace_id"]))
    assert "rejected, first by decontamination" in lines[0]
    text = "\n".join(lines)
    assert (
        "FAIL  decontamination: same text (1.00) as bench.jsonl, row 1" in text
        and "bench.jsonl, row 1: Farmer " in text
    )
    assert all(f"  {name}: " in text for name in ORDER)
    row = next(row for row in rows if not row["verdicts"]["duplicates"]["pass"])
    other = row["verdicts"]["duplicates"]["reason"].split("trace ")[1].rstrip(")")
    assert f"        {other}: Let me count" in "\n".join(explain(quiet[1], quiet[0], row["trace_id"][:12]))
    changed = quiet[1].model_copy(deep=True)
    changed.filters.language.max_run, changed.filters.format = 50, None
    text = "\n".join(explain(changed, quiet[0], row["trace_id"]))
    assert text.count("judged under other settings") == 1 and text.count("no longer has this filter") == 1
    with pytest.raises(UserError, match="no trace's id begins with 'zzz'"):
        list(explain(quiet[1], quiet[0], "zzz"))
    with pytest.raises(UserError, match="more than one trace's id begins with ''"):
        list(explain(quiet[1], quiet[0], ""))


def test_the_command_explains_and_judges_nothing(quiet):
    from typer.testing import CliRunner

    from distill.cli import app
    from distill.recipe_load import dump_recipe

    (quiet[0] / "recipe.yaml").write_text(dump_recipe(quiet[1]))
    before = (quiet[0] / "verdicts.jsonl").stat().st_mtime_ns
    identity = ledger(quiet[0])[0]["trace_id"]
    found = CliRunner().invoke(app, ["filter", str(quiet[0]), "--explain", identity])
    assert found.exit_code == 0 and found.stdout.startswith(f"trace {identity}, sample 0 of problem ")
    assert (quiet[0] / "verdicts.jsonl").stat().st_mtime_ns == before


def test_lines_by_number_and_by_id(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": f"a{n}", "problem_id": 'p é"' if n == 3 else f"p{n % 2}", "x": "y" * n} for n in range(6)]
    text = "".join(json.dumps(row, ensure_ascii=bool(n % 2)) + "\n" + "\n" * (n == 2) for n, row in enumerate(rows))
    path.write_text(text + json.dumps({"x": 1, "problem_id": "p0", "id": "last"}) + '\n{"id": "torn')
    lines = Lines(path, ("id", "problem_id"))
    assert len(lines) == 7
    wanted = np.array([key(name) for name in ("a4", "last", "torn", "nothing")], dtype=np.int64)
    assert lines.find("id", wanted).tolist() == [4, 6, -1, -1]
    assert lines.find("problem_id", np.array([key('p é"'), key("p1")], dtype=np.int64)).tolist() == [3, 1]
    assert [json.loads(lines.read(n)) for n in range(6)] == rows
    assert lines.value(3, "problem_id") == 'p é"' and lines.value(6, "id") == "last" and lines.value(1, "id") == "a1"
    path.write_text('{"id": 7}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: expected the field 'id' with text in it"):
        Lines(path, ("id",))
    with pytest.raises(UserError, match="no such file"):
        Lines(tmp_path / "none.jsonl", ("id",))


def test_problems_are_read_when_asked(tmp_path):
    path = tmp_path / "problems.jsonl"
    asked = [problem(f"Number {n}?") for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    stored = StoredProblems(path)
    assert stored[asked[2]["id"]] == asked[2] and len(stored) == 4 and list(stored) == [row["id"] for row in asked]
    with pytest.raises(KeyError):
        stored["nobody"]


def double(task, batch):
    if task == "die" and 3 in batch:
        os._exit(9)
    if task == "raise" and 3 in batch:
        raise UserError("three is a mistake")
    return [2 * number for number in batch]


def test_workers_keep_the_order_and_hand_errors_back():
    batches = [[n, n + 1] for n in range(0, 40, 2)]
    with Workers(2) as pool:
        assert [x for found in pool.map(double, None, batches) for x in found] == [2 * n for n in range(40)]
        assert list(pool.map(double, None, [])) == []
        with pytest.raises(UserError, match="three is a mistake"):
            list(pool.map(double, "raise", batches))
    with Workers(2) as pool, pytest.raises(RuntimeError, match=r"a worker process died \(exit code 9\)"):
        list(pool.map(double, "die", batches))


def test_workers_end_with_their_parent(tmp_path):
    code = (
        "import time; from pathlib import Path; from distill.workers import Workers; from distill.doctor import run\n"
        "pool = Workers(2); pool._start(); print(*[p.pid for p, _ in pool._started], flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert child.stdout is not None
    workers = [int(pid) for pid in child.stdout.readline().split()]
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(_alive(pid) for pid in workers):
        time.sleep(0.05)
    assert len(workers) == 2 and not any(_alive(pid) for pid in workers)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

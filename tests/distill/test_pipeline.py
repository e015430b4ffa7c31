"""The order, the skipping and the resuming, with stand-in stages that write the real files' names."""

import json
import signal
import subprocess
import sys
import types

import pytest

from distill.errors import UserError
from distill.pipeline import STAGES, run_all, run_stages
from distill.recipe_load import load_recipe

STUDENTS = ["tiny-qwen", "tiny-llama", "tiny-qwen-answers_only", "tiny-llama-answers_only"]
MODELS = ["teacher"] + [name + of for name in STUDENTS[:2] for of in ("", ".base", ".answers_only")]
OUTPUTS = {
    "problems": ["problems.jsonl", "eval_problems.jsonl"],
    "traces": ["traces/traces.jsonl"],
    "filter": ["verdicts.jsonl", "dataset/train.jsonl"],
    "train": [f"students/{name}/config.json" for name in STUDENTS],
    "eval": [f"evals/{name}.jsonl" for name in MODELS],
    "report": ["results.json", "report.html"],
}
ORDER = list(OUTPUTS)


@pytest.fixture
def ran(monkeypatch):
    """Replace every stage by one that writes its files; the list tells which have run."""
    calls = []

    def stand_in(name):
        def run(recipe, run):
            calls.append(name)
            for file in OUTPUTS[name]:
                path = run.path(*file.split("/"))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"stage": name, "seed": recipe.seed}))
            return {"tokens": len(calls), "rows": 3}

        return types.SimpleNamespace(run=run)

    for stage in STAGES:
        monkeypatch.setitem(sys.modules, stage.module, stand_in(stage.name))
    return calls


@pytest.fixture
def start(tmp_path, ran):
    def go(*overrides, stages=ORDER, **options):
        ran.clear()
        run_stages(stages, load_recipe("quickstart", overrides), tmp_path / "run", **options)
        return list(ran)

    return go


def manifest(tmp_path):
    return json.loads((tmp_path / "run" / "manifest.json").read_text())


def test_stages_are_those_of_the_design():
    assert [stage.name for stage in STAGES] == ORDER


def test_everything_runs_once_and_is_then_skipped(start, tmp_path, capsys):
    assert start() == ORDER
    capsys.readouterr()
    assert start() == []
    shown = capsys.readouterr().err
    for stage in ORDER:
        assert f"{stage:<8}  already done, skipped" in shown
    facts = manifest(tmp_path)
    assert facts["environment"]["packages"]["transformers"]
    for count, stage in enumerate(ORDER, start=1):
        entry = facts["stages"][stage]
        assert entry["status"] == "done" and entry["tokens"] == count and entry["rows"] == 3 and entry["seconds"] >= 0


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("problems.count=7", ORDER[:1]),  # the stand-in writes the same problems, so nothing after it changes
        ("sampling.temperature=1.0", ["traces", "filter"]),
        ("filters.length.max_reasoning_tokens=9", ["filter"]),
        ("selection.per_problem=2", ["filter"]),
        ("students.0.epochs=1", ["train"]),
        ("evals.samples=9", ["eval"]),
        ("evals.bootstrap=500", []),
        ("report.traces_shown=1", []),
        ("teacher.batch_size=7", []),
    ],
)
def test_a_changed_setting_redoes_what_reads_it(start, override, again):
    start()
    # The report shows the recipe, so it follows every change.
    assert start(override) == [*again, "report"]
    assert start(override) == []


def test_a_changed_seed_changes_all_that_is_drawn(start):
    start()
    assert start("seed=5") == ["traces", "filter", "train", "eval", "report"]


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("problems.jsonl", ["traces", "filter"]),
        ("eval_problems.jsonl", ["eval"]),
        ("traces/traces.jsonl", ["filter", "report"]),
        ("dataset/train.jsonl", ["train"]),
        ("students/tiny-qwen/config.json", ["eval"]),
        ("evals/teacher.jsonl", ["report"]),
        ("report.html", []),
        ("students/tiny-qwen/training_log.jsonl", []),
    ],
)
def test_an_edited_file_redoes_what_reads_it(start, tmp_path, file, again):
    start()
    (tmp_path / "run" / file).write_text('{"edited": true}')
    assert start() == again


@pytest.mark.parametrize(("stage", "file"), [(stage, file) for stage in ORDER for file in OUTPUTS[stage]])
def test_a_lost_file_is_made_again(start, tmp_path, stage, file):
    start()
    (tmp_path / "run" / file).unlink()
    assert start() == [stage]


def test_a_source_file_counts_by_its_content(start, tmp_path):
    source = tmp_path / "source.jsonl"
    source.write_text('{"problem": "1+1", "answer": "2"}\n')
    override = f"problems={{source: {source}}}"
    assert start(override) == ORDER
    assert start(override) == []
    source.write_text('{"problem": "1+2", "answer": "3"}\n')
    assert start(override)[0] == "problems"


def test_a_failed_stage_is_unfinished_and_later_ones_wait(start, tmp_path, monkeypatch):
    def fail(recipe, run):
        raise UserError("no trace survived the filters")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["distill.filtering"], "run", fail)
        with pytest.raises(UserError, match="no trace survived"):
            start()
    assert manifest(tmp_path)["stages"]["filter"]["status"] == "running"
    with pytest.raises(UserError, match=r"stage 'filter' has not been run; run `distill filter`"):
        start(stages=["train"])
    assert start() == ["filter", "train", "eval", "report"]


def test_a_single_stage_wants_the_same_recipe_before_it(start, tmp_path):
    start()
    assert start("students.0.epochs=1", stages=["train"]) == ["train"]
    with pytest.raises(UserError, match=r"stage 'traces' was made from other settings or files; run `distill traces`"):
        start("sampling.temperature=1.0", stages=["train"])
    recipe = tmp_path / "run" / "recipe.yaml"
    assert load_recipe(recipe).sampling.temperature == 0.6, "a refused start leaves the recipe of what was run"
    assert start("sampling.temperature=1.0", stages=["report"], force=True) == ["report"]
    assert load_recipe(recipe).sampling.temperature == 1.0


def test_somebody_else_s_files_are_taken_as_they_are(start, tmp_path):
    dataset = tmp_path / "run" / "dataset"
    dataset.mkdir(parents=True)
    (dataset / "train.jsonl").write_text("{}")
    assert start(stages=["train"]) == ["train"]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("tiny-quen", r"students\.1\.base: no model 'tiny-quen'; did you mean 'tiny-qwen'\?"),
        ("/nowhere/model", r"students\.1\.base: /nowhere/model: no such checkpoint folder"),
        ("FILE", r"students\.1\.base: .*/model: is a file, expected a checkpoint folder"),
        ("FOLDER", r"students\.1\.base: .*: no tokenizer"),
    ],
)
def test_a_base_that_is_not_there_is_told_before_the_teacher_works(start, ran, tmp_path, base, message):
    (tmp_path / "model").write_text("x")
    base = {"FILE": str(tmp_path / "model"), "FOLDER": str(tmp_path)}.get(base, base)
    with pytest.raises(UserError, match=message):
        start(f"students.1.base={base}")
    assert ran == []
    start(f"students.1.base={base}", stages=["problems", "traces"])
    assert ran == ["problems", "traces"]


@pytest.mark.parametrize("stage", ["filter", "train", "eval", "report"])
def test_a_stage_alone_makes_no_folder_out_of_nothing(start, tmp_path, stage):
    with pytest.raises(UserError, match=r"run: there is nothing to go on from; run `distill run`"):
        start(stages=[stage], force=stage == "report")
    assert not (tmp_path / "run").exists()


def test_run_all_returns_the_folder(tmp_path, ran):
    assert run_all(load_recipe("quickstart"), tmp_path / "run") == tmp_path / "run"
    assert ran == ORDER


SLOW = """
import sys, time, types
from pathlib import Path
import distill.pipeline as pipeline
from distill.recipe_load import load_recipe
from distill.jsonl import Appender, read_jsonl

def run(recipe, run):
    path = run.path("traces", "traces.jsonl")
    with Appender(path) as out:
        have = {row["n"] for _, row in read_jsonl(path)}
        with run.progress("traces", 40, "samples", done=len(have)) as bar:
            for n in range(40):
                if n not in have:
                    time.sleep(0.02)
                    out.append({"n": n})
                    bar._last_beat -= 10
                    bar.advance()
    return {"tokens": 40, "kept": len(have)}

def problems(recipe, run):
    run.path("problems.jsonl").write_text("{}")

sys.modules["distill.traces"] = types.SimpleNamespace(run=run)
sys.modules["distill.problems"] = types.SimpleNamespace(run=problems)
pipeline.run_stages(["problems", "traces"], load_recipe("quickstart"), Path(sys.argv[1]))
"""


def test_kill_9_in_a_stage_then_resume(tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    traces = tmp_path / "run" / "traces" / "traces.jsonl"
    while not (traces.exists() and traces.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = manifest(tmp_path)["stages"]["traces"]
    assert before["status"] == "running" and before["seconds"] > 0
    subprocess.run(command, check=True, capture_output=True)
    after = manifest(tmp_path)["stages"]["traces"]
    assert after["status"] == "done" and after["attempts"] == 2 and after["kept"] >= 5
    assert after["seconds"] >= before["seconds"] + 0.02 * (40 - after["kept"])
    assert [json.loads(line)["n"] for line in traces.read_text().splitlines()] == list(range(40))

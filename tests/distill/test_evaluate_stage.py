"""Stage 'eval': every model once, resumed, and kept apart from samples of other settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import evaluate
from distill.errors import UserError
from distill.jsonl import read_jsonl, write_jsonl_atomic
from tests.distill.small_run import FakeTeacher, install, make_recipe, open_run
from tests.tiny import write_llama, write_qwen, write_teacher

REPOSITORY = Path(__file__).parents[2]
MODELS = ["teacher", "student", "student.base", "student.answers_only"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three different random models: base, student, answers_only."""
    folder = tmp_path_factory.mktemp("models")
    write_qwen(folder / "base", seed=1)
    write_qwen(folder / "student", seed=2)
    write_qwen(folder / "student-answers_only", seed=3)
    return folder


def ready(folder, models, **evals):
    """A run folder just before the stage, and its recipe."""
    settings = {"samples": 2, "max_tokens": 16} | evals
    students = [{"name": "student", "base": str(models / "base")}]
    recipe = make_recipe(students=students, evals=settings, teacher={"kind": "embedded", "model": str(models / "base")})
    for name in ("student", "student-answers_only"):
        if not (folder / "run" / "students" / name).exists():
            shutil.copytree(models / name, folder / "run" / "students" / name)
    rows = [
        {"id": f"p{n}", "problem": f"{n} + 2", "answer": str(n + 2), "kind": "math", "source": "s",
         "meta": {"family": "sum"}}
        for n in range(3)
    ]  # fmt: skip
    (folder / "run" / "eval_problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe, folder / "run"


def answers(ask):
    a, _, b = ask.messages[0]["content"].split()
    return f"so</think>\\boxed{{{int(a) + int(b)}}}", "stop"


def samples(run, name):
    return [row for _, row in read_jsonl(run / "evals" / f"{name}.jsonl", torn_ok=True)]


def test_every_model_answers_every_problem(tmp_path, models, monkeypatch):
    teacher = install(monkeypatch, FakeTeacher(answers))
    recipe, folder = ready(tmp_path, models)
    with open_run(folder, recipe) as run:
        facts = evaluate.run(recipe, run)
    by_model = {name: samples(folder, name) for name in MODELS}
    for name, rows in by_model.items():
        assert sorted((r["problem_id"], r["sample"]) for r in rows) == [
            (f"p{n}", k) for n in range(3) for k in range(2)
        ]
        assert {r["model"] for r in rows} == {name.replace(".", "/")}
    assert facts["models"]["teacher"]["tasks"]["distill_problems"]["mean@k"] == 1.0
    assert len(teacher.asked) == 6 and {r["revision"] for r in by_model["teacher"]} == {teacher.id}
    texts = [tuple(sorted(r["text"] for r in by_model[name])) for name in MODELS]
    assert len(set(texts)) == 4  # four different models answered
    assert facts["tokens"] == sum(r["tokens"] for rows in by_model.values() for r in rows) > 0
    assert facts["made"] == 24 and not (folder / "evals" / "superseded").exists()


def test_a_second_run_asks_nothing_and_loads_no_weights(tmp_path, models, monkeypatch):
    teacher = install(monkeypatch, FakeTeacher(answers))
    recipe, folder = ready(tmp_path, models)
    with open_run(folder, recipe) as run:
        evaluate.run(recipe, run)
        before = {name: (folder / "evals" / f"{name}.jsonl").read_bytes() for name in MODELS}
        monkeypatch.setattr("students.pretrained.load_model", lambda *_: pytest.fail("weights were loaded"))
        asked = len(teacher.asked)
        facts = evaluate.run(recipe, run)
    assert len(teacher.asked) == asked and facts["made"] == 0
    assert before == {name: (folder / "evals" / f"{name}.jsonl").read_bytes() for name in MODELS}


def test_other_settings_supersede_and_going_back_finds_the_old_samples(tmp_path, models, monkeypatch):
    install(monkeypatch, FakeTeacher(answers))
    recipe, folder = ready(tmp_path, models)
    with open_run(folder, recipe) as run:
        evaluate.run(recipe, run)
        first = {name: {r["id"]: r for r in samples(folder, name)} for name in MODELS}
        warmer, _ = ready(tmp_path, models, temperature=0.9)
        facts = evaluate.run(warmer, run)
        assert facts["made"] == 24
        assert {r["sampling"]["temperature"] for name in MODELS for r in samples(folder, name)} == {0.9}
        facts = evaluate.run(recipe, run)
        assert facts["made"] == 0
    assert {name: {r["id"]: r for r in samples(folder, name)} for name in MODELS} == first


@pytest.mark.parametrize("write", [1, 2, 3])
def test_killed_while_superseded_samples_come_back_none_is_lost(tmp_path, models, monkeypatch, write):
    """Going back moves samples from one file to the other, in three writes."""
    install(monkeypatch, FakeTeacher(answers))
    recipe, folder = ready(tmp_path, models)
    warmer, _ = ready(tmp_path, models, temperature=0.9)
    calls = []

    def dying(path, rows):
        calls.append(path)
        if len(calls) == write:
            raise KeyboardInterrupt
        return write_jsonl_atomic(path, rows)

    with open_run(folder, recipe) as run:
        evaluate.run(recipe, run)
        evaluate.run(warmer, run)
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "write_jsonl_atomic", dying)
            with pytest.raises(KeyboardInterrupt):
                evaluate.run(recipe, run)
        for settings in (recipe, warmer):
            assert evaluate.run(settings, run)["made"] == 0
        assert {len(samples(folder, name)) for name in MODELS} == {6}


def test_retrained_weights_are_evaluated_again_and_the_rest_is_not(tmp_path, models, monkeypatch):
    install(monkeypatch, FakeTeacher(answers))
    recipe, folder = ready(tmp_path, models)
    with open_run(folder, recipe) as run:
        evaluate.run(recipe, run)
        shutil.copy(models / "base" / "model.safetensors", folder / "students" / "student" / "model.safetensors")
        facts = evaluate.run(recipe, run)
    assert facts["made"] == 6
    same = [sorted(r["text"] for r in samples(folder, name)) for name in ("student", "student.base")]
    assert same[0] == same[1]  # the same weights on the same seeds


def test_a_torn_line_is_cut_and_answered_again(tmp_path, models, monkeypatch):
    install(monkeypatch, FakeTeacher(answers))
    recipe, folder = ready(tmp_path, models)
    with open_run(folder, recipe) as run:
        evaluate.run(recipe, run)
        path = folder / "evals" / "student.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        facts = evaluate.run(recipe, run)
    assert (facts["torn"], facts["made"]) == (1, 1)
    assert {json.loads(x)["text"] for x in whole.splitlines()} == {r["text"] for r in samples(folder, "student")}


def test_the_base_is_asked_in_the_students_chat_form(tmp_path, models, monkeypatch):
    from evals.hf import HFBackend

    prompts: dict[str, set[str]] = {}
    render = HFBackend.render

    def remember(self, messages):
        prompts.setdefault(self.tokenizer.name_or_path, set()).add(render(self, messages))
        return render(self, messages)

    monkeypatch.setattr(HFBackend, "render", remember)
    install(monkeypatch, FakeTeacher(answers))
    other = tmp_path / "models"
    shutil.copytree(models, other)
    (other / "base" / "chat_template.jinja").unlink()  # as Llama-3.1-8B, a base without a chat template
    recipe, folder = ready(tmp_path, other)
    with open_run(folder, recipe) as run:
        evaluate.run(recipe, run)
    assert len(prompts) == 3 and len({frozenset(p) for p in prompts.values()}) == 1


def test_only_what_the_recipe_names_is_evaluated(tmp_path, models):
    recipe, folder = ready(tmp_path, models, teacher=False)
    recipe.students[0].baselines = []
    with open_run(folder, recipe) as run:
        evaluate.run(recipe, run)
    assert [p.name for p in (folder / "evals").iterdir()] == ["student.jsonl"]


def test_llama_and_qwen_students_side_by_side_equal_one_at_a_time(tmp_path, models, monkeypatch):
    write_llama(tmp_path / "llama", seed=4)
    recipe, folder = ready(tmp_path, models, teacher=False)
    recipe.students[0].baselines = ["base"]
    other = recipe.students[0].model_copy(update={"name": "llama", "base": str(tmp_path / "llama")})
    recipe.students.append(other)
    shutil.copytree(tmp_path / "llama", folder / "students" / "llama")
    names = ["student", "student.base", "llama", "llama.base"]
    found = []
    for cores in ({0, 1}, {0}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        with open_run(folder, recipe) as run:
            evaluate.run(recipe, run)
        found.append([sorted((r["id"], r["text"]) for r in samples(folder, name)) for name in names])
        shutil.rmtree(folder / "evals")
    assert found[0] == found[1]


def test_the_real_embedded_teacher_beside_its_students(tmp_path, models):
    teacher = write_teacher(tmp_path / "r1")
    recipe, folder = ready(tmp_path, models)
    recipe.teacher.model = str(teacher)
    with open_run(folder, recipe) as run:
        facts = evaluate.run(recipe, run)
        assert facts["made"] == 24 and evaluate.run(recipe, run)["made"] == 0
    rows = samples(folder, "teacher")
    assert {r["revision"].split("@")[0] for r in rows} == {"r1"} and all(0 < r["tokens"] <= 16 for r in rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "students/student/tokenizer.json").unlink(), "no tokenizer"),
        (lambda run: (run / "students/student/model.safetensors").unlink(), r"no weights|expected \*\.safetensors"),
        (lambda run: shutil.rmtree(run / "students/student"), "no such checkpoint folder|no config"),
        (lambda run: (run / "eval_problems.jsonl").write_text("{\n"), r"eval_problems\.jsonl:1"),
    ],
)
def test_what_is_missing_is_named_and_other_models_keep_their_samples(tmp_path, models, monkeypatch, damage, message):
    install(monkeypatch, FakeTeacher(answers))
    recipe, folder = ready(tmp_path, models)
    damage(folder)
    with open_run(folder, recipe) as run, pytest.raises(ValueError, match=message):
        evaluate.run(recipe, run)


def test_an_unknown_task_is_named_before_any_model_is_loaded(tmp_path, models, monkeypatch):
    monkeypatch.setattr("students.pretrained.load_tokenizer", lambda *_: pytest.fail("a model was opened"))
    recipe, folder = ready(tmp_path, models, tasks=["gsm9k"])
    with open_run(folder, recipe) as run, pytest.raises(ValueError, match="gsm9k"):
        evaluate.run(recipe, run)
    assert issubclass(UserError, ValueError)


CHILD = """
import sys, time
from pathlib import Path
import distill.traces as traces
from distill import evaluate
from tests.distill.small_run import FakeTeacher, open_run
from tests.distill.test_evaluate_stage import answers, ready
from evals.decode import _Batch
folder, models = Path(sys.argv[1]), Path(sys.argv[2])
traces.identify_teacher = lambda settings: {"id": "fake@0"}
traces.open_teacher = lambda *_: FakeTeacher(answers)
step = _Batch.step
def slow(self):
    time.sleep(float(sys.argv[3]))
    return step(self)
_Batch.step = slow
recipe, path = ready(folder, models, samples=6, max_tokens=40, batch_size=4)
with open_run(path, recipe) as run:
    print(evaluate.run(recipe, run)["made"])
"""


def test_killed_and_started_again_the_results_are_the_same(tmp_path, models):
    def command(folder, pause):
        return [sys.executable, "-c", CHILD, str(folder), str(models), str(pause)]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    child = subprocess.Popen(
        command(killed, 0.03), cwd=REPOSITORY, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    lines, deadline = 0, time.monotonic() + 90
    while time.monotonic() < deadline and child.poll() is None and lines < 20:
        lines = sum(p.read_bytes().count(b"\n") for p in killed.glob("run/evals/*.jsonl"))
        time.sleep(0.05)
    assert child.poll() is None and lines >= 20
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = sum(len(samples(killed / "run", path.stem)) for path in (killed / "run" / "evals").glob("*.jsonl"))
    made = {}
    for folder in (killed, whole):
        done = subprocess.run(command(folder, 0), cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        made[folder] = int(done.stdout)
    assert made[whole] == 4 * 3 * 6 and made[killed] == made[whole] - kept
    for name in MODELS:
        rows = [sorted((r["id"], r["text"], r["correct"]) for r in samples(folder / "run", name)) for folder in made]
        assert rows[0] == rows[1]

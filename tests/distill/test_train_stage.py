"""Stage 'train' on a dataset folder: every model the recipe asks for, and one clear error when something is wrong."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from distill import train, training_jobs
from distill.errors import UserError
from distill.recipe import Recipe
from distill.runfolder import RunFolder
from tests import tiny
from tests.distill.small_run import make_recipe

FACTS = {"steps", "tokens", "examples", "too_long", "seconds", "padding_fraction", "loss", "validation_loss"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    tiny.write_qwen(folder / "qwen")
    tiny.write_llama(folder / "llama")
    return folder


def write_dataset(folder: Path, count: int = 40) -> None:
    (folder / "answers_only").mkdir(parents=True)
    for name, numbers in (("train", range(count)), ("validation", range(count, count + 4))):
        for where, work in ((folder, True), (folder / "answers_only", False)):
            (where / f"{name}.jsonl").write_text("".join(json.dumps(_row(n, work)) + "\n" for n in numbers))


def _row(n: int, work: bool) -> dict[str, Any]:
    steps = f"{n}+{n}={2 * n}{' hm' * (7 * n % 17)}" if work else ""
    reply = f"<think>\n{steps}\n</think>\n\n\\boxed{{{2 * n}}}"
    return {"messages": [{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": reply}]}


def recipe_for(bases: Path, **changes: Any) -> Recipe:
    common = {"epochs": 2.0, "max_length": 128, "tokens_per_step": 512, "learning_rate": 3e-3, "checkpoint_every": 2}
    students = [{"name": name, "base": str(bases / name), **common, **changes} for name in ("qwen", "llama")]
    return make_recipe(students=students)


def run_stage(folder: Path, recipe: Recipe) -> dict[str, Any]:
    with RunFolder.open(folder, recipe) as run:
        return train.run(recipe, run)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "workers_for", lambda jobs: 1)


def test_students_and_baselines_in_parallel_processes(bases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_dataset(folder / "dataset")
    facts = run_stage(folder, recipe_for(bases))
    names = {"qwen", "qwen-answers_only", "llama", "llama-answers_only"}
    assert {path.name for path in (folder / "students").iterdir()} == names == set(facts["students"])
    assert facts["workers"] == min(4, training_jobs.cores())
    assert facts["tokens"] == sum(model["tokens"] for model in facts["students"].values()) > 0
    assert all(set(model) == FACTS for model in facts["students"].values())
    for student in ("qwen", "llama"):
        traces, answers = facts["students"][student], facts["students"][f"{student}-answers_only"]
        assert abs(traces["tokens"] - answers["tokens"]) < 60 and traces["steps"] == answers["steps"]
        assert traces["validation_loss"] is not None
        log = [json.loads(line) for line in (folder / "students" / student / "training_log.jsonl").open()]
        assert log[-1]["tokens"] == traces["tokens"] and log[-1]["loss"] < log[0]["loss"]
        AutoModelForCausalLM.from_pretrained(folder / "students" / student)
    assert "`dataset/` of the run `small`" in (folder / "students" / "qwen" / "README.md").read_text()


def test_here_as_in_parallel_and_finished_ones_are_kept(bases: Path, tmp_path: Path, one_process: None) -> None:
    folder = tmp_path / "run"
    write_dataset(folder / "dataset")
    first = run_stage(folder, recipe_for(bases))
    weights = folder / "students" / "llama" / "model.safetensors"
    before = weights.read_bytes(), weights.stat().st_mtime_ns
    shutil.rmtree(folder / "students" / "qwen")
    second = run_stage(folder, recipe_for(bases))
    assert (weights.read_bytes(), weights.stat().st_mtime_ns) == before
    for facts in (first, second):
        del facts["students"]["qwen"]["seconds"]
    assert first == second


def test_without_baseline_or_validation_set(bases: Path, tmp_path: Path, one_process: None) -> None:
    folder = tmp_path / "run"
    write_dataset(folder / "dataset")
    shutil.rmtree(folder / "dataset" / "answers_only")
    (folder / "dataset" / "validation.jsonl").unlink()
    facts = run_stage(folder, recipe_for(bases, baselines=["base"], epochs=0.5))
    assert set(facts["students"]) == {"qwen", "llama"}
    assert facts["students"]["qwen"]["validation_loss"] is None


def test_lora_settings_reach_the_trainer(bases: Path) -> None:
    lora = {"r": 8, "alpha": 4.0, "target_modules": ["q_proj"]}
    recipe = recipe_for(bases, method="lora", lora=lora, dtype="bfloat16", packing=False, schedule="cosine")
    settings = train.sft_settings(recipe.students[0], 7)
    assert settings.lora is not None and (settings.lora.r, settings.lora.target_modules) == (8, ("q_proj",))
    assert (settings.method, settings.packing, settings.max_length) == ("lora", False, 128)
    assert (settings.optimisation.seed, settings.optimisation.dtype, settings.optimisation.schedule) == (
        7, "bfloat16", "cosine",
    )  # fmt: skip


def test_answers_only_without_reference_answers(bases: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "run" / "dataset")
    shutil.rmtree(tmp_path / "run" / "dataset" / "answers_only")
    with pytest.raises(UserError, match=r"students\.0\.baselines: 'answers_only' needs problems with a reference"):
        run_stage(tmp_path / "run", recipe_for(bases))


def test_bad_line_names_its_file(bases: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "run" / "dataset")
    with (tmp_path / "run" / "dataset" / "answers_only" / "train.jsonl").open("a") as file:
        file.write('{"text": "no messages"}\n')
    with pytest.raises(ValueError, match=r"answers_only/train\.jsonl, row 41: expected 'messages'"):
        run_stage(tmp_path / "run", recipe_for(bases))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_fails_in_training_is_one_sentence_wherever_it_runs(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(train, "workers_for", lambda jobs: workers)
    write_dataset(tmp_path / "run" / "dataset")
    broken = tmp_path / "broken"
    shutil.copytree(bases, broken)
    weights = broken / "llama" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"student llama: .*broken/llama: the model cannot be loaded") as told:
        run_stage(tmp_path / "run", recipe_for(broken, epochs=0.5, baselines=[]))
    assert "\n" not in str(told.value)


def _stage_in_child(folder: Path, recipe: Recipe) -> None:
    os.setpgrp()
    run_stage(folder, recipe)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_kill_9_and_again(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    """A killed parent takes its workers along, a killed worker stops the stage; started again, it ends the same."""
    recipe = recipe_for(bases, epochs=8.0, baselines=[])
    folder = tmp_path / "run"
    write_dataset(folder / "dataset")
    stage = multiprocessing.get_context("spawn").Process(target=_stage_in_child, args=(folder, recipe))
    stage.start()
    assert stage.pid is not None
    log = folder / "students" / "qwen.partial" / "training_log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and stage.is_alive()
        time.sleep(0.02)
    workers = [pid for pid in _children(stage.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == min(2, training_jobs.cores())
    os.kill(stage.pid if victim == "parent" else workers[0], signal.SIGKILL)
    stage.join(60)
    assert stage.exitcode == (-signal.SIGKILL if victim == "parent" else 1)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the stage"
        time.sleep(0.02)
    assert not (folder / "students" / "qwen").exists()
    if victim == "worker":
        return  # the same files are left as after the parent's death
    monkeypatch.setattr(train, "workers_for", lambda jobs: 1)
    facts = run_stage(folder, recipe)
    other = tmp_path / "other"
    write_dataset(other / "dataset")
    assert {n: f["loss"] for n, f in facts["students"].items()} == {
        name: found["loss"] for name, found in run_stage(other, recipe)["students"].items()
    }
    for name in facts["students"]:
        ours, theirs = (root / "students" / name / "model.safetensors" for root in (folder, other))
        assert ours.read_bytes() == theirs.read_bytes()

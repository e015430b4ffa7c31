"""kill -9 at any moment and start again: bit for bit the run that was never interrupted."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from teacher import train_state
from teacher.batches import Cursor
from teacher.train import train
from tests.teacher import train_toy

ROOT = Path(__file__).resolve().parents[2]
SKIP = {"seconds", "tokens_per_second"}


def start(folder: Path, optimizer: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.teacher.train_toy", str(folder), optimizer]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lines(folder: Path) -> list[dict]:
    path = folder / "training_log.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def last_checkpoint(folder: Path) -> str:
    found = sorted(p.name for p in (folder / "checkpoints").glob("*")) if (folder / "checkpoints").exists() else [""]
    return found[-1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_runs_end_in_the_same_weights(optimizer: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output, _ = start(whole, optimizer).communicate()
    assert (whole / "model.safetensors").exists(), output.decode()

    rng = random.Random(0)
    kills = 0
    for _ in range(2):
        process = start(killed, optimizer)
        begin = lines(killed)[-1]["step"] if lines(killed) else 0
        goal = begin + rng.randint(3, 6)
        while process.poll() is None and not any(row["step"] >= goal for row in lines(killed)):
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 2 and not (killed / "model.safetensors").exists()
    output, _ = start(killed, optimizer).communicate()
    assert b"resumed at step" in output, output.decode()

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    for name in ("weights", "optimizer", "average"):
        paths = (f / "checkpoints" / last_checkpoint(f) / f"{name}.safetensors" for f in (killed, whole))
        one, other = (load_file(path) for path in paths)
        assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in other)
    one, other = ([{k: v for k, v in row.items() if k not in SKIP} for row in lines(f)] for f in (killed, whole))
    assert one == other
    assert len(list((killed / "checkpoints").iterdir())) == 1


def test_a_finished_run_started_again_does_nothing_new(tmp_path: Path) -> None:
    settings = train_toy.settings(total_tokens=1_000, ema=0.5)
    first = train(train_toy.model(), train_toy.example, settings, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "training_log.jsonl").read_bytes()

    again = train(train_toy.model(), train_toy.example, settings, tmp_path)
    assert again == first
    assert before == ((tmp_path / "model.safetensors").read_bytes(), (tmp_path / "training_log.jsonl").read_bytes())


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    torn = tmp_path / ".writing-step-00000010"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000005").mkdir()
    assert train_state.latest(tmp_path) == tmp_path / "step-00000005"
    assert not torn.exists()
    assert train_state.latest(tmp_path / "none") is None


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    settings = train_toy.settings(total_tokens=3_000, checkpoint_every=5, log_every=1)

    def stop(index: int):
        if index > 85:
            raise OSError("the disk is gone")
        return train_toy.example(index)

    with pytest.raises(OSError, match="the disk is gone"):
        train(train_toy.model(), stop, settings, tmp_path)
    with (tmp_path / "training_log.jsonl").open("ab") as file:
        file.write(b'{"step": 999, "loss": 0}\n{"step": 10')
    assert last_checkpoint(tmp_path) == "step-00000005"
    result = train(train_toy.model(), train_toy.example, settings, tmp_path)
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, result.steps + 1))


def test_other_settings_or_another_model_are_refused(tmp_path: Path) -> None:
    settings = train_toy.settings(total_tokens=600)
    train(train_toy.model(), train_toy.example, settings, tmp_path)
    with pytest.raises(ValueError, match=r"step-\d+ was written with learning_rate=0.01, this run has 0.02"):
        train(train_toy.model(), train_toy.example, train_toy.settings(total_tokens=600, learning_rate=0.02), tmp_path)
    with pytest.raises(ValueError, match=r"data='', this run has 'b'"):
        train(train_toy.model(), train_toy.example, train_toy.settings(total_tokens=600, data="b"), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the model: .* is \(.*\), expected"):
        train(train_toy.model(hidden_size=48), train_toy.example, settings, tmp_path)
    train(train_toy.model(), train_toy.example, train_toy.settings(total_tokens=600, log_every=7), tmp_path)


def test_a_write_that_fails_is_an_oserror_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full device."""
    model = train_toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    first = train_state.save(tmp_path, train_state.Progress(step=1), {}, model, optimizer, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"step-00000002/weights\.safetensors"):
            train_state.save(tmp_path, train_state.Progress(step=2), {}, model, optimizer, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert train_state.latest(tmp_path) == first
    assert train_state.read(first)[0].step == 1


def test_progress_survives_the_round_trip(tmp_path: Path) -> None:
    model = train_toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    progress = train_state.Progress(3, 400, 1.25, Cursor(17, (9, 12)))
    folder = train_state.save(tmp_path, progress, asdict(train_toy.settings()), model, optimizer, None)
    read, stored = train_state.read(folder)
    assert read == progress
    train_toy.settings().check_resumes(stored, "x")

"""Several processes take the same steps as one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from students.launch import main
from tests.students.rows import rows


def write_job(folder: Path, base: Path, out: str, **changes: Any) -> Path:
    for name, part in (("train", rows(30)), ("validation", rows(4, first=30))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    optimisation = {"learning_rate": 3e-3, "checkpoint_every": 3, **changes}
    fields = {"base": str(base), "epochs": 2, "max_length": 128, "tokens_per_step": 512, "micro_batch_tokens": 128}
    job = {"settings": {**fields, "optimisation": optimisation}, "train": str(folder / "train.jsonl"),
           "validation": str(folder / "validation.jsonl"), "out": str(folder / out)}  # fmt: skip
    path = folder / f"{out}.json"
    path.write_text(json.dumps(job))
    return path


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(llama: Path, tmp_path: Path) -> None:
    main(write_job(tmp_path, llama, "one"))
    job = write_job(tmp_path, llama, "two")
    how = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *how, "--main_process_port", "0"]
    launch += ["-m", "students.launch", str(job)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        launch, cwd=root, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for ours, theirs in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "tokens", "lr", "validation_loss"):
            assert (key in ours) == (key in theirs)
            assert theirs.get(key, 0) == pytest.approx(ours.get(key, 0), rel=1e-4)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines] == [line["step"] for line in two]  # one process speaks for both
    weights = load_file(tmp_path / "one" / "model.safetensors")
    for name, weight in load_file(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], atol=2e-4, rtol=0)


def test_bad_job_is_named(llama: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text("{")
    with pytest.raises(ValueError, match=r"job.json: not valid JSON"):
        main(job)
    job.write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"job.json: missing train, out"):
        main(job)
    with pytest.raises(ValueError, match=r"settings: .*unexpected keyword argument 'momentum'"):
        main(write_job(tmp_path, llama, "x", momentum=1))

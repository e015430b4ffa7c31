"""Killed anywhere and started again, training ends in the very same bytes as if it had never been disturbed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from students.checkpoints import TrainingLog, saved_tokens
from students.lora import Lora
from tests.students.kill import killed, train
from tests.students.rows import settings

TIMES = ("tokens_per_second",)


def outcome(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Every file's bytes, but for what tells the time, and the log without it."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    log = [json.loads(line) for line in files.pop("training_log.jsonl").splitlines()]
    facts = json.loads(files.pop("training.json"))
    del facts["result"]["seconds"]
    files["training.json"] = json.dumps(facts).encode()
    return files, [{key: value for key, value in line.items() if key not in TIMES} for line in log]


@pytest.fixture(scope="module")
def undisturbed(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("undisturbed") / "student"
    train(settings(qwen), out)
    return outcome(out)


@pytest.mark.parametrize("step", [1, 3, 7, 12])
def test_killed_at_a_step(qwen: Path, undisturbed: Any, tmp_path: Path, step: int) -> None:
    out, seen = tmp_path / "student", []
    killed(settings(qwen), out, "step", step)
    assert not out.exists() and (out.with_name("student.partial") / "training_log.jsonl").exists()
    train(settings(qwen), out, lambda record: seen.append(record["step"]))
    # A checkpoint every three steps: at most two steps are done twice, and none is left out.
    first = (step - 1) // 3 * 3 + 1
    assert seen == list(range(first, len(undisturbed[1]) + 1))
    assert outcome(out) == undisturbed


@pytest.mark.parametrize("call", [1, 2, 3, 5, 6])
def test_killed_at_a_rename(qwen: Path, undisturbed: Any, tmp_path: Path, call: int) -> None:
    """os.replace moves the log, each checkpoint and the finished folder into place."""
    out = tmp_path / "student"
    killed(settings(qwen), out, "rename", call)
    assert not out.exists()
    train(settings(qwen), out)
    assert outcome(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_killed_after_the_folder_is_in_place(qwen: Path, undisturbed: Any, tmp_path: Path) -> None:
    out = tmp_path / "student"
    killed(settings(qwen), out, "published")
    assert outcome(out) == undisturbed
    assert train(settings(qwen), out).skipped
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_killed_twice_with_adapters_and_dropout(qwen: Path, tmp_path: Path) -> None:
    """Dropout draws on the random state, so that has to come back too."""
    how = settings(qwen, method="lora", lora=Lora(r=4, dropout=0.2), dtype="bfloat16")
    train(how, tmp_path / "one")
    for step in (5, 11):
        killed(how, tmp_path / "two", "step", step)
    train(how, tmp_path / "two")
    ours, theirs = outcome(tmp_path / "two"), outcome(tmp_path / "one")
    card = "README.md"
    assert ours[0].pop(card) == theirs[0].pop(card).replace(b"# one", b"# two")
    assert ours == theirs


def test_killed_with_muon_and_averaged_weights(qwen: Path, tmp_path: Path) -> None:
    how = settings(qwen, optimizer="muon", ema_decay=0.9)
    train(how, tmp_path / "a" / "student")
    out = tmp_path / "b" / "student"
    killed(how, out, "step", 8)
    train(how, out)
    assert outcome(out) == outcome(tmp_path / "a" / "student")


@pytest.mark.parametrize("published", [False, True])
def test_killed_while_an_old_checkpoint_was_being_removed(
    qwen: Path, undisturbed: Any, tmp_path: Path, published: bool
) -> None:
    out, work_dir = tmp_path / "student", tmp_path / "student.partial"
    killed(settings(qwen), out, *(("published",) if published else ("step", 8)))
    half = work_dir / "checkpoint-3"
    half.mkdir(parents=True)
    (half / "optimizer.bin").write_bytes(b"what was left")
    assert saved_tokens(work_dir) > 0
    train(settings(qwen), out)
    assert outcome(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_checkpoint_of_other_settings_is_not_continued(qwen: Path, undisturbed: Any, tmp_path: Path) -> None:
    out, seen = tmp_path / "student", []
    other = settings(qwen, learning_rate=1e-3)
    killed(other, out, "step", 8)
    assert saved_tokens(tmp_path / "student.partial") > 0
    train(settings(qwen), out, lambda record: seen.append(record["step"]))
    assert seen[0] == 1 and outcome(out) == undisturbed


@pytest.mark.parametrize("full", [True, False])
def test_failing_checkpoint_writer_is_told_as_what_it_is_and_loses_nothing(
    qwen: Path, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Torch says "unexpected pos" when the device is full; whether it is, is asked of the system."""
    out = tmp_path / "student"

    def fail(folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "half").write_text("x")
        raise RuntimeError("enforce fail: unexpected pos 455552 vs 455440")

    def fsync(handle: int) -> None:
        if full and "probe" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:

        def log(record: dict[str, Any]) -> None:
            if record["step"] == 8:
                patch.setattr("accelerate.Accelerator.save_state", lambda self, folder: fail(folder))
                patch.setattr(os, "fsync", fsync)

        with pytest.raises(
            OSError if full else RuntimeError, match="No space left" if full else "unexpected pos"
        ) as told:
            train(settings(qwen), out, log)
    if full:
        assert ".checkpoint-9.tmp" in told.value.filename
    assert sorted(path.name for path in (tmp_path / "student.partial").iterdir()) == [
        "checkpoint-6",
        "training_log.jsonl",
    ]
    train(settings(qwen), out)
    assert outcome(out) == undisturbed


def test_log_is_cut_to_the_checkpoint_and_a_torn_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "training_log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step"')
    log = TrainingLog(path, 2, True)
    log.append({"step": 3, "loss": 0.5})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'

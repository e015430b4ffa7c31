"""Writing a checkpoint: what a kill, a power cut or a full disk leaves behind."""

import os
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from teacher import load_model
from teacher.checkpoint import INDEX
from teacher.checkpoint_write import save_checkpoint
from tests.tiny import deepseek_config


@pytest.fixture
def model():
    torch.manual_seed(0)
    return load_model(deepseek_config())


def assert_same(model, other):
    found = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("layout", ["single to single", "single to shards", "shards to shards", "shards to single"])
def test_a_kill_while_a_folder_is_rewritten_never_leaves_a_mix(model, tmp_path, layout, monkeypatch):
    """Stop at every rename and removal in turn; what is then there is the old model, the new one, or an error."""
    before, after = (10**9 if kind == "single" else 30_000 for kind in layout.split(" to "))
    torch.manual_seed(1)
    newer = load_model(deepseek_config())
    seen = set()
    for step in range(100):
        folder = tmp_path / str(step)
        save_checkpoint(model, folder, shard_bytes=before)
        left = step

        def stop(operation, *arguments, **settings):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return operation(*arguments, **settings)

        with monkeypatch.context() as patched:
            patched.setattr("os.replace", partial(stop, os.replace))
            patched.setattr(Path, "unlink", partialmethod(partial(stop, Path.unlink)))
            try:
                save_checkpoint(newer, folder, shard_bytes=after)
                finished = True
            except KeyboardInterrupt:
                finished = False
        try:
            found = load_model(folder)
        except ValueError:
            seen.add("error")
        else:
            same = found.lm_head.weight.equal(newer.lm_head.weight)
            seen.add("new" if same else "old")
            assert_same(newer if same else model, found)
        if finished:
            assert same
            save_checkpoint(newer, folder, shard_bytes=after)
            assert not list(folder.glob("*.tmp"))
            break
    assert finished and step >= 3
    assert "new" in seen and ("old" in seen or before == 30_000)


def test_files_are_on_the_disk_before_they_take_their_names(model, tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        "os.fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr("os.replace", lambda old, new: (events.append((str(old), str(new))), replace(old, new)))
    save_checkpoint(model, tmp_path, shard_bytes=30_000)
    renames = [event for event in events if isinstance(event, tuple)]
    assert {Path(new).name for _, new in renames} == {path.name for path in tmp_path.iterdir()}
    for rename in renames:
        assert rename[0] in events[: events.index(rename)], "renamed before it was synced"
    assert Path(renames[-1][1]).name == INDEX
    assert events[-1] == str(tmp_path)


def test_full_disk_is_an_oserror_that_names_the_file(model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("teacher.checkpoint_write.save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors\.tmp: .*No space left"):
        model.save_pretrained(tmp_path)

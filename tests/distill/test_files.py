import errno
import os

import pytest

from distill.files import sha256_json, sha256_tree, write_atomic, write_json_atomic


def test_write_atomic_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a" / "b.bin"
    write_atomic(path, b"old and long")
    write_atomic(path, [b"ne", b"w"])
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["b.bin"]


def test_full_device_keeps_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    write_json_atomic(path, {"a": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_json_atomic(path, {"a": 2})
    assert caught.value.filename == str(path)
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["b.json"]


def test_json_hash_knows_content_not_order():
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.5})


def test_tree_hash_sees_names_and_content_but_not_hidden_files(tmp_path):
    assert sha256_tree(tmp_path / "none") is None
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x").write_text("1")
    first = sha256_tree(folder)
    (folder / ".lock").write_text("9")
    (folder / "sub" / ".x.1.tmp").write_text("9")
    assert sha256_tree(folder) == first
    (folder / "sub" / "x").write_text("2")
    second = sha256_tree(folder)
    (folder / "sub" / "x").rename(folder / "sub" / "y")
    assert len({first, second, sha256_tree(folder)}) == 3

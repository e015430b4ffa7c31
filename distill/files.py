"""Whole files: written so that a kill leaves the old or the new one, and hashed so that a stage knows its inputs."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, chunks: bytes | Iterable[bytes]) -> None:
    """Write `chunks` to `path` through a temporary file in the same folder, fsync and os.replace.

    Raises OSError (with the path in `filename`) if the device is full or the folder cannot be written; `path` is then
    untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json_atomic(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value` (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(path: Path) -> str | None:
    """Content hash of a file, or of all files below a folder by relative name; None if `path` is absent.

    Hidden files (locks, temporary files) do not count.
    """
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        return None
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return sha256_json([[name, sha256_file(path / name)] for name in names if "/." not in f"/{name}"])

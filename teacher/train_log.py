"""training_log.jsonl: a line for every optimizer step, written a few steps at a time.

Figures stay on the device until they are written, so that a GPU never waits for the log. A resumed run first cuts
the lines after its checkpoint: the file always reads as one uninterrupted run.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch


class TrainingLog:
    """Appends steps to `path`. Tensors in a row (scalars or vectors) become numbers and lists when it is written."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self.waiting: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                # Every whole line was written by us; the last one may be torn.
                if not line.endswith(b"\n") or (row := json.loads(line))["step"] > last_step:
                    break
                self.last = row
                kept.append(line)
            draft = path.with_name(f".{path.name}.writing")
            with draft.open("wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a step for the next `write`."""
        self.waiting.append(row)

    def write(self, **timing: Any) -> list[dict[str, Any]]:
        """Append the waiting steps, each with the `timing` of all of them; returns the rows as written.

        `last` is the last row in the file.
        """
        rows = [{key: _plain(value) for key, value in row.items()} | timing for row in self.waiting]
        self.waiting = []
        self.last = rows[-1] if rows else self.last
        with self.path.open("ab") as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        return rows


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value

"""Runs of `distill traces` against servers that misbehave, and what must hold of what they leave behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from tests.faults.server import HARMLESS, MODEL, OUTCOMES

ROOT = Path(__file__).resolve().parents[2]
_MARK = re.compile(r"#(\w+/\d+/\d+)#")
# What a trace says of each answer that ends a sample; None is a good one.
GIVES: dict[Any, str] = {None: "stop", **OUTCOMES, **dict.fromkeys(HARMLESS, "stop")}
Row = dict[str, Any]


class FaultServer:
    """tests/faults/server.py in a process; may be stopped and started again, at the same address and with its log."""

    def __init__(
        self, log: Path, faults: Sequence[str] = (), *, share: float = 0.3, latency: float = 0.005, name: str = "a",
        seed: int = 0,
    ) -> None:  # fmt: skip
        with socket.socket() as free:  # kept for a later start, so not left to the server to choose
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.url = log, f"http://127.0.0.1:{self.port}/v1"
        self._command = [
            sys.executable, "-m", "tests.faults.server", "--log", str(log), "--port", str(self.port), "--name", name,
            "--faults", ",".join(faults), "--share", str(share), "--latency", str(latency), "--seed", str(seed),
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith("listening")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def events(self) -> list[Row]:
        """Its log so far; a last line that it was killed in is left out."""
        lines = self.log.read_bytes().split(b"\n")[:-1] if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def __enter__(self) -> "FaultServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Run:
    """A recipe file and its run folder. Further keywords are fields of `teacher`."""

    def __init__(
        self, folder: Path, servers: Sequence[FaultServer], *, problems: int = 30, samples: int = 1,
        concurrency: int = 16, filters: Row | None = None, sampling: Row | None = None, **teacher: Any,
    ) -> None:  # fmt: skip
        self.home, self.folder, self.servers = folder, folder / "runs" / "faults", servers
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "problems.jsonl", "w") as file:
            for number in range(problems):
                file.write(json.dumps({"problem": f"What is {number} plus 7?", "answer": str(number + 7)}) + "\n")
        endpoints = [{"url": server.url, "concurrency": concurrency} for server in servers]
        settings = {"kind": "endpoint", "model": MODEL, "endpoints": endpoints, "idle_timeout": 1.0, "timeout": 2.5}
        tree = {
            "name": "faults",
            "problems": {"source": str(folder / "problems.jsonl")},
            "teacher": settings | teacher,
            "sampling": {"samples": samples, "max_tokens": 1000} | (sampling or {}),
            "filters": filters or {},
            "students": [{"name": "student", "base": "tiny-qwen"}],
            "evals": {"tasks": ["gsm8k_r1"], "teacher": False},
        }
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(tree))
        self.traces = self.folder / "traces" / "traces.jsonl"

    def argv(self, *options: str) -> list[str]:
        return ["traces", str(self.recipe), "--runs-dir", str(self.home / "runs"), *options]

    def wanted(self) -> set[str]:
        """The ids of all samples of the recipe."""
        from distill.problems import read_problems
        from distill.recipe_load import load_recipe
        from distill.traces import identify_teacher, plan

        recipe = load_recipe(str(self.recipe), [])
        problems = read_problems(self.folder / "problems.jsonl")
        return {ask.id for _, _, ask in plan(recipe, problems, identify_teacher(recipe.teacher)["id"])}

    def rows(self) -> list[Row]:
        """The whole lines of traces.jsonl."""
        return whole_rows(self.traces)

    def events(self) -> list[Row]:
        """All servers' logs, in the order of time."""
        return sorted((event for server in self.servers for event in server.events()), key=lambda event: event["time"])


def whole_rows(path: Path) -> list[Row]:
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


class Command:
    """A `distill` command under way, in a session of its own."""

    def __init__(self, pid: int, job: Row) -> None:
        self.pid, self._job = pid, job

    @property
    def ended(self) -> bool:
        return os.path.exists(self._job["done"])

    def wait(self, limit: float = 60.0) -> int:
        """Its exit status; negative: the signal that ended it."""
        end = time.monotonic() + limit
        while not self.ended:
            if time.monotonic() > end:
                said = self.said()
                self.kill()
                raise AssertionError(f"not done after {limit} s; it said: {said[-2000:]}")
            time.sleep(0.005)
        return int(Path(self._job["done"]).read_text())

    def signal(self, number: int) -> None:
        if not self.ended:  # then the id may be another process's by now
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> int:
        self.signal(signal.SIGKILL)
        return self.wait()

    def said(self) -> str:
        """What it wrote to stdout and stderr."""
        return Path(self._job["stderr"]).read_text()


class Zygote:
    """Starts `distill` commands quickly; see tests/faults/zygote.py."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o777)  # commands of other users write their words here
        self._folder, self.commands = folder, list[Command]()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(self, argv: Sequence[str], **job: Any) -> Command:
        assert self._process.stdin is not None and self._process.stdout is not None
        name = str(self._folder / str(len(self.commands)))
        job |= {"argv": list(argv), "stderr": f"{name}.err", "done": f"{name}.done"}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self.commands.append(Command(int(self._process.stdout.readline()), job))
        return self.commands[-1]

    def run(self, argv: Sequence[str], limit: float = 60.0, **job: Any) -> tuple[int, str]:
        """(exit status, what it said)."""
        command = self.start(argv, **job)
        return command.wait(limit), command.said()

    def end_all(self) -> None:
        """Kill what a failed test has left at work."""
        for command in self.commands:
            command.kill()

    def close(self) -> None:
        self.end_all()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def check_complete(run: Run) -> list[Row]:
    """Every sample of the recipe is there once, and nothing else is."""
    rows = run.rows()
    twice = [identity for identity, count in Counter(row["id"] for row in rows).items() if count > 1]
    assert not twice, f"{len(twice)} samples twice, {twice[0]} for one"
    assert {row["id"] for row in rows} == run.wanted()
    return rows


def check_against_log(rows: Sequence[Row], events: Sequence[Row], *, restarted: bool = False) -> None:
    """Each trace is what a server said of its own sample, and a sample that was answered was not asked again.

    `restarted`: the client was killed in between, or endpoints were; then an answer may have been given and lost.
    """
    answered = {event["mark"]: event for event in events if event["event"] == "answered"}
    asks = Counter(event["sample"] for event in events if event["event"] == "asked")
    last = {event["sample"]: event for event in events if event["event"] == "asked"}
    for row in rows:
        sample = row["sampling"]["seed"]
        found = _MARK.search(row["text"])
        if found:  # else an outcome without the text that has the mark
            assert found[1].split("/")[1] == str(sample), f"{row['id']} has another sample's text"
            event = answered[found[1]]
        else:
            event = last[sample]
        assert event["fault"] in GIVES, f"{row['id']} was made of {event['fault']}"
        assert row["finish_reason"] == GIVES[event["fault"]], f"{row['finish_reason']} after {event['fault']}"
        if not restarted:
            assert event["mark"] == last[sample]["mark"], f"{row['id']} was asked again after its answer"
            # What came to nothing through a closed connection or an endpoint that was down is no attempt of the sample.
            assert 1 <= row["attempts"] <= asks[sample], f"{row['id']}: {row['attempts']} said, {asks[sample]} made"

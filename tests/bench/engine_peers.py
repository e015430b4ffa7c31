"""The sides that tests/bench/engine.py compares, as child processes, and the search for each side's best settings.

A contestant is one process with one or two threads, or two processes with one thread and half of the requests each:
whoever has two cores may use them so, and for most of the sides it is the fastest. Whatever a side gains by it counts
for that side. Wall time runs from the first start to the last end.
"""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Settings = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
START_LIMIT, RUN_LIMIT = 240.0, 300.0


@dataclass
class Timing:
    tokens: int
    wall: float
    cpu: float
    others: float  # cores that other processes of the machine kept busy meanwhile
    outputs: list[list[int]] = field(repr=False)

    @property
    def rate(self) -> float:
        return self.tokens / self.wall


class Contestant:
    """Child processes that work on the same job, each on its share. Use as a context manager."""

    def __init__(self, settings: Settings, python: str) -> None:
        self.settings = settings
        self.name = describe(settings)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the children
        self.children = []
        for number in range(settings["processes"]):
            env = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "TRANSFORMERS_VERBOSITY": "error"}
            if settings["side"] == "vllm":
                cores = f"0-{settings['threads'] - 1}" if settings["processes"] == 1 else str(number)
                env["VLLM_CPU_OMP_THREADS_BIND"] = cores
                if settings.get("preload"):
                    env["LD_PRELOAD"] = settings["preload"]
            command = [python, "-m", "tests.bench.engine_child"]
            self.children.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                    text=True, start_new_session=True,
                )
            )  # fmt: skip
        for child in self.children:
            self._send(child, settings)
        for child in self.children:
            self._receive(child, START_LIMIT)

    def run(self, job: Job, limit: float = RUN_LIMIT) -> Timing:
        """Raises RuntimeError with what the process last said if it ends, or is not done after `limit` seconds."""
        count = len(self.children)
        parts = [list(range(n, len(job["prompts"]), count)) for n in range(count)]
        before = machine_busy()
        since = time.monotonic()
        job = {"cache": self.settings.get("cache"), "batch": self.settings.get("batch", 256)} | job
        job["batch"] = -(-job["batch"] // count)
        for child, part in zip(self.children, parts, strict=True):
            own = {"prompts": [job["prompts"][i] for i in part], "lengths": [job["lengths"][i] for i in part]}
            self._send(child, job | own)
        answers = [self._receive(child, limit) for child in self.children]
        seconds = time.monotonic() - since
        cpu = sum(answer["cpu"] for answer in answers)
        outputs: list[list[int]] = [[] for _ in job["prompts"]]
        for answer, part in zip(answers, parts, strict=True):
            for i, tokens in zip(part, answer["tokens"], strict=True):
                outputs[i] = tokens
        wall = max(answer["end"] for answer in answers) - min(answer["start"] for answer in answers)
        others = max(0.0, (machine_busy() - before - cpu) / seconds)
        return Timing(sum(map(len, outputs)), wall, cpu, others, outputs)

    def _send(self, child: "subprocess.Popen[str]", message: Job) -> None:
        assert child.stdin is not None
        child.stdin.write(json.dumps(message) + "\n")
        child.stdin.flush()

    def _receive(self, child: "subprocess.Popen[str]", limit: float) -> Job:
        assert child.stdout is not None
        alarm = threading.Timer(limit, child.kill)
        alarm.start()
        line = child.stdout.readline()
        alarm.cancel()
        if not line:
            self.log.seek(0)
            tail = "".join(self.log.readlines()[-12:])
            code = child.wait()
            reason = f"was not done after {limit:.0f} s" if code == -signal.SIGKILL else f"ended with code {code}"
            raise RuntimeError(f"{tail}{self.name} {reason}")
        return json.loads(line)

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()
            child.wait()
        self.log.close()


def describe(settings: Settings) -> str:
    left_out = {"side", "model", "processes", "threads", "max_len", "eos", "dtype", "preload"}
    options = [f"{key} {value}" for key, value in settings.items() if key not in left_out]
    options += ["libraries preloaded"] if settings.get("preload") else []
    many = {(1, 1): "one thread", (1, 2): "two threads", (2, 1): "two processes"}
    layout = many[settings["processes"], settings["threads"]]
    return ", ".join([f"{settings['side']} {settings['dtype']}", layout, *options])


def machine_busy() -> float:
    """CPU seconds that the machine has spent on anything, the hypervisor's share included."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


LAYOUTS = ({"processes": 1, "threads": 1}, {"processes": 1, "threads": 2}, {"processes": 2, "threads": 1})


def starts(side: str, base: Settings) -> list[Settings]:
    """Every layout on the two cores in either precision, each side's other settings at their likely best."""
    options = {"ours": {}, "transformers": {"batch": 256, "cache": "dynamic", "experts": "grouped_mm"}}
    options["vllm"] = {"mode": "eager"}
    dtypes = ("float32", "bfloat16")
    return [base | layout | {"side": side, "dtype": t} | options[side] for layout in LAYOUTS for t in dtypes]


def changes(side: str, vllm: str, quick: bool) -> list[Settings]:
    """What is then tried one by one on the fastest, and kept where it helps."""
    if side == "transformers":
        return [{"experts": "eager"}, {"cache": "static"}, *({"batch": size} for size in (128, 64, 32, 16))]
    if side == "vllm":
        # Its guide advises these two libraries; the second comes with the package, the first with the system.
        openmp = Path(vllm).parent.parent / "lib" / "libiomp5.so"
        allocator = next(iter(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")), None)
        both = ":".join(str(library) for library in (allocator, openmp) if library and library.exists())
        return ([{"preload": both}] if both else []) + ([] if quick else [{"mode": "compiled"}])
    return []


class Search:
    """The fastest settings of a side. Each trial runs once to warm up, then twice, and the faster one counts.

    One with less than two thirds of the best rate so far has no second run, and one that takes four times as long, and
    10 s more, is given up. Batches are halved as long as that loses no more than a fifth.
    """

    def __init__(self, side: str, base: Settings, python: str, job: Job, quick: bool) -> None:
        self.python, self.job = python, job
        self.trials: list[Job] = []
        # On two cores the whole machine may be used by one process or by two: the best of each is wanted.
        self.best: dict[int, tuple[float, Settings]] = {}
        for settings in starts(side, base):
            self.offer(settings)
        if not self.best:
            raise RuntimeError(f"no settings of {side} ran; the last said:\n{self.trials[-1]['error']}")
        for change in changes(side, python, quick):
            top, settings = max(self.best.values(), key=lambda found: found[0])
            if (
                "batch" not in change
                or change["batch"] == 128
                or self.trials[-1].get("tokens_per_second", 0) > 0.8 * top
            ):
                self.offer(settings | change)
        whole = max(self.best.values(), key=lambda found: found[0])[1]
        for processes, (_, settings) in list(self.best.items()):
            learned = {key: whole.get(key) for key in ("experts", "cache", "batch", "mode", "preload") if key in whole}
            if processes != whole["processes"] and settings | learned != settings:
                self.offer(settings | learned)

    def offer(self, settings: Settings) -> None:
        try:
            with Contestant(settings, self.python) as contestant:
                contestant.run(self.job | {"lengths": [min(length, 8) for length in self.job["lengths"]]}, 60.0)
                top = max((rate for rate, _ in self.best.values()), default=0.0)
                limit = 4 * sum(self.job["lengths"]) / top + 10 if top else RUN_LIMIT
                runs = [contestant.run(self.job, limit)]
                if runs[0].rate > top * 2 / 3:
                    runs.append(contestant.run(self.job, limit))
        except RuntimeError as error:  # settings that a side cannot run, or hardly, are a finding and not the end
            self.trials.append({"settings": settings, "error": str(error)})
            say(f"        given up  {str(error).splitlines()[-1]}")
            return
        timing = max(runs, key=lambda run: run.rate)
        self.trials.append({"settings": settings, "tokens_per_second": timing.rate, "others": timing.others})
        say(f"  {timing.rate:8,.0f} tokens/s  {describe(settings)}")
        processes = settings["processes"]
        if processes not in self.best or timing.rate > self.best[processes][0]:
            self.best[processes] = (timing.rate, settings)


def say(text: str) -> None:
    print(text, flush=True)

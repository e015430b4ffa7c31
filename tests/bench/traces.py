"""Speed of trace generation against an instant server, beside Curator, distilabel, open-r1's loop and a bare one.

    tests/bench/traces_env.sh FOLDER && python -m tests.bench.traces --peers FOLDER

In one run: what the server answers at most (a raw load generator); then every side with the same prompts at its best
concurrency, found on fewer of them. Ours is the real trace stage with its durable writes and each sample verified as
it comes. Wall time is from the moment a side has imported what it needs until all samples are on its disk, set-up
included; a CPU second counts the side's processes, not the server. Then what ours needs for five times the prompts,
and how fast it goes on in a folder with a million finished samples. A peer that fails is reported and passed over.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.traces_ours import make_folder, make_recipe
from tests.bench.traces_resume import SAMPLES, resume
from tests.bench.traces_server import InstantServer
from tests.bench.traces_sides import SideFailed, Timing, measure

SETTINGS: dict[str, list[dict[str, int]]] = {  # what each side's best is looked for among
    "ours": [{"concurrency": n} for n in (64, 256)],
    "bare": [{"concurrency": n} for n in (16, 32, 64, 128)],
    "open-r1": [{"concurrency": n} for n in (128, 512)],
    "curator": [{"concurrency": n} for n in (32, 64, 256)],
    "distilabel": [{"concurrency": n, "replicas": r} for n, r in ((100, 1), (400, 1), (400, 2))],
}
STREAMS = ("ours", "bare")  # the others cannot


@dataclass
class Entry:
    """One side in one mode."""

    side: str
    stream: bool
    best: dict[str, int] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    error: str | None = None

    def facts(self) -> dict[str, Any]:
        return {"side": self.side, "stream": self.stream, "settings": self.best, "error": self.error,
                "runs": [asdict(timing) for timing in self.timings]}  # fmt: skip


class Bench:
    def __init__(self, options: argparse.Namespace, server: InstantServer, scratch: Path) -> None:
        self.options, self.server, self.scratch = options, server, scratch

    def once(self, entry: Entry, settings: dict[str, int], prompts: int) -> Timing:
        """One run of one side, in a folder of its own. Raises SideFailed."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            out = Path(folder) / "run"
            command = self._command(entry, settings, prompts, out)
            timing = measure(command, self.server, self.options.limit)
        if timing.finished != prompts:
            raise SideFailed(f"finished {timing.finished} of {prompts} samples")
        return timing

    def _command(self, entry: Entry, settings: dict[str, int], prompts: int, out: Path) -> list[str]:
        flags = ["--stream"] if entry.stream else []
        if entry.side == "ours":
            make_folder(out, prompts)
            return ours(self.server.url, out, settings["concurrency"], *flags)
        out.mkdir()
        python = sys.executable if entry.side == "bare" else str(self.options.peers / entry.side / "bin" / "python")
        if "replicas" in settings:
            flags += ["--replicas", str(settings["replicas"])]
        file = self.prompts(prompts)
        module = [python, "-m", "tests.bench.traces_children", entry.side]
        return [*module, self.server.url, str(file), str(out), str(settings["concurrency"]), *flags]

    def prompts(self, count: int) -> Path:
        """The prompts that ours sends, in a file for the others."""
        path = self.scratch / f"prompts{count}.jsonl"
        if not path.exists():
            instruction = make_recipe(self.server.url, False, 1).sampling.instruction
            lines = (json.dumps({"prompt": f"What is {n} plus 7?\n{instruction}"}) + "\n" for n in range(count))
            path.write_text("".join(lines), encoding="utf-8")
        return path

    def load(self, stream: bool) -> dict[str, float]:
        command = [sys.executable, "-m", "tests.bench.traces_load", str(self.server.port), str(self.options.prompts)]
        done = subprocess.run([*command, *(["--stream"] if stream else [])], capture_output=True, check=True)
        return dict(json.loads(done.stdout))


def ours(url: str, folder: Path, concurrency: int, *flags: str) -> list[str]:
    return [sys.executable, "-m", "tests.bench.traces_ours", url, str(folder), str(concurrency), *flags]


def compare(bench: Bench, sides: list[str], options: argparse.Namespace) -> list[Entry]:
    entries = [Entry(side, stream) for stream in (False, True) for side in sides if not stream or side in STREAMS]
    for entry in entries:
        tried = []
        for settings in SETTINGS[entry.side]:
            try:
                tried.append((bench.once(entry, settings, options.search).rate, settings))
            except SideFailed as error:
                entry.error = f"{settings}: {error}"
        if tried:
            entry.best, entry.error = max(tried, key=lambda found: found[0])[1], None
    for number in range(options.rounds):
        for entry in entries:
            rounds = options.rounds if entry.side in STREAMS else options.peer_rounds
            if entry.error is None and number < rounds:
                try:
                    entry.timings.append(bench.once(entry, entry.best, options.prompts))
                except SideFailed as error:
                    entry.error = str(error)
                print(row(entry), flush=True)
    return entries


HEADER = (
    "| side | replies | settings | samples/s | runs | samples a CPU s | server busy | memory MB |\n"
    "|---|---|---|---|---|---|---|---|"
)


def row(entry: Entry) -> str:
    """A line of the table: medians, and the slowest and fastest run."""
    mode = "streamed" if entry.stream else "plain"
    settings = ", ".join(f"{name} {value}" for name, value in entry.best.items())
    if entry.error is not None or not entry.timings:
        return f"| {entry.side} | {mode} | {settings} | failed: {entry.error} | | | | |"
    rates = [timing.rate for timing in entry.timings]
    busy = statistics.median(timing.server_cpu / timing.wall for timing in entry.timings)
    spread = f"{len(rates)}: {min(rates):,.0f} to {max(rates):,.0f}" if len(rates) > 1 else "1"
    return (
        f"| {entry.side} | {mode} | {settings} | {statistics.median(rates):,.0f} | {spread} "
        f"| {statistics.median(t.per_cpu_second for t in entry.timings):,.0f} | {busy:.0%} "
        f"| {max(t.memory for t in entry.timings) / 1e6:,.0f} |"
    )


def verdicts(entries: list[Entry]) -> list[str]:
    """Ours against each other side, by medians."""
    medians = {(e.side, e.stream): statistics.median(t.rate for t in e.timings) for e in entries if e.timings}
    said = []
    for (side, stream), rate in medians.items():
        if side != "ours" and ("ours", stream) in medians:
            mode = "streamed" if stream else "plain"
            said.append(f"ours / {side}, {mode}: {medians['ours', stream] / rate:.2f}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="what traces_env.sh made; without it the peers are left out")
    parser.add_argument("--sides", default="ours,bare,open-r1,curator,distilabel")
    parser.add_argument("--prompts", type=int, default=20000)
    parser.add_argument("--search", type=int, default=2000, help="prompts for finding each side's best settings")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=1, help="of the peers, which take minutes")
    parser.add_argument("--many", type=int, default=100000, help="prompts for the memory of ours; 0: not measured")
    parser.add_argument("--finished", type=int, default=1000000, help="samples there at the resume; 0: not measured")
    parser.add_argument("--characters", type=int, default=4000, help="length of a reply, about four a token")
    parser.add_argument("--chunk", type=int, default=64, help="characters a streamed event")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one run of one side")
    parser.add_argument("--scratch", type=Path, help="where the run folders go; the system's temporary folder if unset")
    parser.add_argument("--json", type=Path, help="also write every figure there")
    options = parser.parse_args()
    sides = [side for side in options.sides.split(",") if side in STREAMS or options.peers]
    begun = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(dir=options.scratch, prefix="traces-bench-") as scratch,
        InstantServer(characters=options.characters, chunk=options.chunk) as server,
    ):
        bench = Bench(options, server, Path(scratch))
        facts: dict[str, Any] = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "options": {name: str(value) for name, value in vars(options).items()},
            "server": {"plain": bench.load(False), "streamed": bench.load(True)},
        }
        for mode, found in facts["server"].items():
            print(f"server, {mode}: {found['rate']:,.0f} replies/s at most (raw load generator)", flush=True)
        print(f"\n{options.prompts:,} prompts, replies of {options.characters:,} characters\n\n{HEADER}", flush=True)
        entries = compare(bench, sides, options)
        print(f"\n{HEADER}", *map(row, entries), "", *verdicts(entries), sep="\n", flush=True)
        facts["sides"] = [entry.facts() for entry in entries]
        if options.many and "ours" in sides:
            facts["many"] = many(bench, entries[0], options.many)
        if options.finished and "ours" in sides:
            facts["resume"] = going_on(bench, options.finished)
    print(f"\nall of it took {time.perf_counter() - begun:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def many(bench: Bench, entry: Entry, prompts: int) -> dict[str, Any]:
    try:
        timing = bench.once(Entry("ours", False), entry.best or SETTINGS["ours"][0], prompts)
    except SideFailed as error:
        print(f"{prompts:,} prompts: failed: {error}")
        return {"error": str(error)}
    print(f"{prompts:,} prompts: {timing.memory / 1e6:,.0f} MB, {timing.rate:,.0f} samples/s", flush=True)
    return asdict(timing)


def going_on(bench: Bench, finished: int) -> dict[str, Any]:
    folder = bench.scratch / "resumed"
    try:
        command = ours(bench.server.url, folder, 64, "--samples", str(SAMPLES), "--no-verify")
        found = resume(command, folder, bench.server.url, finished)
    except SideFailed as error:
        print(f"resume: failed: {error}")
        return {"error": str(error)}
    for name, what in (("first", "without an index"), ("again", "with the index")):
        part = found[name]
        print(
            f"{finished:,} finished samples of {found['line_bytes']:,} bytes, {what}: first new sample on the disk "
            f"after {part['seconds']:.1f} s ({part['cpu']:.1f} of a CPU), {part['memory'] / 1e6:,.0f} MB",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()

"""traces/accounts.json: what generation came to so far, over all starts, in a form that adds up over processes.

It is small whatever the run's size, and written as a whole.
"""

import json
import secrets
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.files import write_json_atomic
from distill.generation.throughput import Throughput
from distill.generation.totals import Sums, Totals

NAME = "accounts.json"
_MERGED = "accounts.*.json"
_VERSION = 1
_STEPS_TOLD = 60  # of throughput, in the manifest and the report


@dataclass
class Record:
    origin: str = field(default_factory=lambda: secrets.token_hex(8))  # of the folder that it was begun in
    totals: Totals = field(default_factory=Totals)
    throughput: Throughput = field(default_factory=Throughput)
    starts: int = 0
    wall_seconds: float = 0.0
    gpu_seconds: float = 0.0
    errors: dict[str, Counter[str]] = field(default_factory=dict)  # endpoint -> kind -> failed attempts
    limits: dict[str, int] = field(default_factory=dict)  # endpoint -> requests in flight it was last given
    failed: Counter[str] = field(default_factory=Counter)  # samples given up in some start, by the last error's kind
    failed_cost: float = 0.0
    right: int = 0
    wrong: int = 0

    @classmethod
    def load(cls, path: Path) -> "Record":
        """The record at `path`, empty if there is none. Raises UserError if the file is broken."""
        if not path.is_file():
            return cls()
        try:
            saved = json.loads(path.read_bytes())
            if saved.pop("version") != _VERSION or len(bytes.fromhex(saved["origin"])) != 8:  # it names a file
                raise ValueError
            saved["totals"] = Totals.from_json(saved["totals"])
            saved["throughput"] = Throughput.from_json(saved["throughput"])
            saved["errors"] = {name: Counter(kinds) for name, kinds in saved["errors"].items()}
            saved["failed"] = Counter(saved["failed"])
            return cls(**saved)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: not the accounts of this version of distill; move it away to count time and errors anew"
            ) from None

    def save(self, path: Path) -> None:
        saved = {**vars(self), "totals": self.totals.to_json(), "throughput": self.throughput.to_json()}
        saved.update({name: round(saved[name], 3) for name in ("wall_seconds", "gpu_seconds")})
        write_json_atomic(path, {"version": _VERSION, **saved})

    def add(self, other: "Record") -> None:
        """What another shard came to: as if it had run beside this one, so its wall time is no further time."""
        self.totals.add(other.totals)
        self.throughput.add(other.throughput)
        self.starts += other.starts
        self.wall_seconds = max(self.wall_seconds, other.wall_seconds)
        self.gpu_seconds += other.gpu_seconds
        for name, kinds in other.errors.items():
            self.errors.setdefault(name, Counter()).update(kinds)
        self.limits.update(other.limits)
        self.failed.update(other.failed)
        self.failed_cost += other.failed_cost
        self.right += other.right
        self.wrong += other.wrong

    def with_shards(self, folder: Path) -> "Record":
        """Together with the accounts of other folders that were merged into `folder`."""
        whole = Record()
        for record in [self, *(Record.load(path) for path in sorted(folder.glob(_MERGED)))]:
            whole.add(record)
        return whole

    def facts(self) -> dict[str, Any]:
        """For the manifest and the report. Costs include failed attempts; times are None where nothing timed it."""
        sums = self.totals.all()
        cost = sums.cost + self.failed_cost
        errors = sum(self.errors.values(), Counter[str]())
        facts: dict[str, Any] = {
            "finished": sums.finished,
            "prompt_tokens": sums.prompt_tokens,
            "completion_tokens": sums.completion_tokens,
            "cost": round(cost, 6),
            "wall_seconds": round(self.wall_seconds, 3) if self.starts else None,
            "gpu_hours": round(self.gpu_seconds / 3600, 6) if self.starts else None,
            "starts": self.starts,
            "latency": latency(sums),
            "attempts": sums.attempts,
            "retried": sums.retried,
            "outcomes": dict(sums.outcomes.most_common()),
            "errors": dict(errors.most_common()),
            "failed": dict(self.failed.most_common()),
        }
        facts["per_finished"] = each(facts, sums.finished)
        if self.right or self.wrong:
            facts["verified"] = {"right": self.right, "wrong": self.wrong}
            facts["per_verified"] = each(facts, self.right)
        facts["endpoints"] = self._endpoints()
        facts["throughput"] = self.throughput.thinned(_STEPS_TOLD).to_json()
        return facts

    def _endpoints(self) -> dict[str, Any]:
        parts = dict(self.totals.parts)
        if len(self.errors) == 1 and parts.keys() == {None}:  # traces name their endpoint only where there are several
            parts = dict.fromkeys(self.errors, parts[None])
        names = [name for name in parts if name is not None]
        names += [name for name in self.errors if name not in names]
        return {
            name: {
                **{key: getattr(sums, key) for key in ("finished", "prompt_tokens", "completion_tokens", "cost")},
                "latency": latency(sums),
                "errors": dict(self.errors.get(name, Counter()).most_common()),
                "limit": self.limits.get(name),
            }
            for name in names
            for sums in [parts.get(name) or Sums()]
        }


def merge_accounts(source: Path, out: Path) -> None:
    """Keep the accounts of the traces folder `source` beside those of `out`, in place of what was kept of it before."""
    for path in [source / NAME, *source.glob(_MERGED)]:
        if path.is_file():
            record = Record.load(path)
            record.save(out / _MERGED.replace("*", record.origin))


def latency(sums: Sums) -> dict[str, float] | None:
    """Seconds of the attempt that brought the reply; None where no sample was timed."""
    if not sums.seconds:
        return None
    return {f"p{percent}": sums.percentile(percent / 100) or 0.0 for percent in (50, 90, 99)}


def each(facts: dict[str, Any], traces: int) -> dict[str, float | None] | None:
    """Everything spent, divided by a number of traces; None without any."""
    if not traces:
        return None
    keys = ("prompt_tokens", "completion_tokens", "cost", "wall_seconds", "gpu_hours")
    return {key: None if facts[key] is None else facts[key] / traces for key in keys}

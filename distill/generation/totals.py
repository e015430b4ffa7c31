"""Sums over finished samples, constant in size however many there are."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

# Buckets of latency grow by this factor each, so that a percentile is off by at most half of it, 2.5%.
_GROWTH = 1.05
_PER_LOG = 1 / math.log(_GROWTH)
_SHORTEST, _LONGEST = 1e-4, 1e6  # seconds; what lies outside counts as these, so there are 473 buckets at most


class Sums:
    """Of one endpoint, or of a run. `latency` counts samples by the logarithm of their seconds."""

    def __init__(self) -> None:
        self.finished = self.prompt_tokens = self.completion_tokens = self.attempts = self.retried = 0
        self.seconds = self.cost = 0.0
        self.outcomes: Counter[str] = Counter()  # by finish_reason
        self.latency: Counter[int] = Counter()

    def count(self, outcome: str, prompt: int, completion: int, seconds: float, cost: float, attempts: int) -> None:
        """One more sample."""
        self.finished += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.seconds += seconds
        self.cost += cost
        self.attempts += attempts
        self.retried += attempts > 1
        self.outcomes[outcome] += 1
        if not _SHORTEST <= seconds <= _LONGEST:
            seconds = _SHORTEST if seconds < _SHORTEST else _LONGEST
        self.latency[math.floor(math.log(seconds) * _PER_LOG)] += 1

    def add(self, other: "Sums") -> None:
        """Everything in `other` as well."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def percentile(self, share: float) -> float | None:
        """Seconds within which `share` of the samples came, to 2.5%; None without samples."""
        rank = math.ceil(share * self.finished)
        for bucket in sorted(self.latency):
            rank -= self.latency[bucket]
            if rank <= 0:
                return float(f"{_GROWTH ** (bucket + 0.5):.3g}")
        return None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "latency": {str(bucket): n for bucket, n in sorted(self.latency.items())}}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Sums":
        sums = cls()
        vars(sums).update(saved)
        sums.outcomes = Counter(saved["outcomes"])
        sums.latency = Counter({int(bucket): n for bucket, n in saved["latency"].items()})
        return sums


class Totals:
    """The sums of each endpoint; under None those of samples that name no endpoint."""

    def __init__(self) -> None:
        self.parts: dict[str | None, Sums] = {}

    def trace(self, row: Mapping[str, Any]) -> None:
        """Count a line of traces.jsonl."""
        self.of(row.get("endpoint")).count(
            row["finish_reason"], row["prompt_tokens"], row["reasoning_tokens"] + row["answer_tokens"],
            row["seconds"], row["cost"], row.get("attempts", 1),
        )  # fmt: skip

    def of(self, endpoint: str | None) -> Sums:
        part = self.parts.get(endpoint)
        if part is None:
            part = self.parts[endpoint] = Sums()
        return part

    def all(self) -> Sums:
        """Over all endpoints."""
        whole = Sums()
        for part in self.parts.values():
            whole.add(part)
        return whole

    def add(self, other: "Totals") -> None:
        for endpoint, part in other.parts.items():
            self.of(endpoint).add(part)

    def to_json(self) -> list[dict[str, Any]]:
        return [{"endpoint": endpoint, **part.to_json()} for endpoint, part in self.parts.items()]

    @classmethod
    def from_json(cls, saved: list[dict[str, Any]]) -> "Totals":
        totals = cls()
        for entry in saved:
            totals.parts[entry["endpoint"]] = Sums.from_json({k: v for k, v in entry.items() if k != "endpoint"})
        return totals


def error_kind(error: str | None) -> str:
    """'http_500' of 'http_500: upstream timed out'."""
    return (error or "unknown").split(":")[0].strip() or "unknown"

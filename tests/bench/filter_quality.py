"""Precision and recall of the filters on the labelled sample (tests/data): rejecting is the positive.

    python -m tests.bench.filter_quality [--json FILE] [--set language.max_run=2 ...]

Printed by part of the sample: `random` and `chosen` real traces, `faulty` copies; then every trace on which filter and
label disagree, with both sides' reason. The chosen ones were taken because a filter had rejected them or nearly so:
their figures, and those of all together, are not those of traces as they come.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from tests.data.beyond import score_agreement, score_decontamination, score_outliers
from tests.data.labelled import Counts, judge, read_sample, score

PARTS = {"": "all", "random": "random", "chosen": "chosen", "faulty": "faulty"}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def line(name: str, part: str, counts: Counts) -> str:
    numbers = [len(found) for found in (counts.hits, counts.false_alarms, counts.missed, counts.passed)]
    cells = "".join(f"{number:>8}" for number in numbers)
    return f"{name:<16}{part:<8}{cells}{percent(counts.precision):>11}{percent(counts.recall):>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="FILTER.SETTING=VALUE")
    chosen = parser.parse_args()
    settings: dict[str, dict[str, Any]] = {}
    for change in chosen.set:
        path, _, value = change.partition("=")
        name, _, setting = path.partition(".")
        settings.setdefault(name, {})[setting] = yaml.safe_load(value)
    rows = read_sample()
    verdicts = judge(rows, settings)
    scores = {title: score(rows, verdicts, part) for part, title in PARTS.items()}
    print(f"{'filter':<16}{'part':<8}{'right':>8}{'wrong':>8}{'missed':>8}{'passed':>8}{'precision':>11}{'recall':>8}")
    for name in verdicts:
        for title, found in scores.items():
            print(line(name, title, found[name]))
    whole, parts = score_decontamination()
    long, rounds = score_outliers()
    print("\nOn the labelled problems and samples:")
    print(line("decontamination", "all", whole), line("agreement", "all", score_agreement()), sep="\n")
    print(line("outliers", "all", long))
    for part, counts in (parts | rounds).items():
        print(f"  {part:<38}{len(counts.hits):>4} rejected rightly{len(counts.false_alarms):>4} wrongly,"
              f"{len(counts.missed):>4} missed")  # fmt: skip
    by_id = {row["id"]: (row, number) for number, row in enumerate(rows)}
    for name, counts in scores["all"].items():
        for kind, ids in (
            ("rejected, label says good", counts.false_alarms),
            ("passed, label says bad", counts.missed),
        ):
            for identity in ids:
                row, number = by_id[identity]
                label = row["fault"] or row["note"]
                print(f"\n{name}, {identity}: {kind}\n  label:  {label}\n  filter: {verdicts[name][number].reason}")
    if chosen.json:
        report = {
            title: {n: vars(c) | {"precision": c.precision, "recall": c.recall} for n, c in found.items()}
            for title, found in scores.items()
        }
        chosen.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the traces of a run folder cost, whoever made them and whether or not the stage is done."""

from pathlib import Path
from typing import Any

from distill.generation.record import NAME, Record, each
from distill.generation.totals import Totals
from distill.jsonl import read_jsonl

Row = dict[str, Any]


def generation(folder: Path, manifest: Row, accepted: int | None) -> Row | None:
    """The facts of Record.facts, with "per_accepted" where the filters have run; None without traces.

    They are the manifest's where the stage wrote them down, else summed up from the lines of traces.jsonl, as of runs
    under way, imported traces and runs from before there were accounts: of the latter only the stage's seconds are
    known. Raises UserError for a broken line.
    """
    path = folder / "traces" / "traces.jsonl"
    if not path.is_file():
        return None
    entry = manifest.get("stages", {}).get("traces", {})
    facts = entry.get("generation") if entry.get("status") == "done" else None
    if facts is None:
        record = Record.load(folder / "traces" / NAME).with_shards(folder / "traces")
        record.totals = _read(path, folder / "verdicts.jsonl")
        facts = record.facts()
        if not record.starts and any(part.seconds for part in record.totals.parts.values()):
            facts["wall_seconds"] = entry.get("seconds")
            facts["per_finished"] = each(facts, facts["finished"])
    return {**facts, "accepted": accepted, "per_accepted": each(facts, accepted or 0)}


def _read(path: Path, verdicts: Path) -> Totals:
    """Once the filters have run, a trace without a verdict is of an older recipe."""
    judged = {row["trace_id"] for _, row in read_jsonl(verdicts, torn_ok=True)} if verdicts.is_file() else None
    totals = Totals()
    for _, row in read_jsonl(path, torn_ok=True):
        if judged is None or row["id"] in judged:
            totals.trace(row)
    return totals

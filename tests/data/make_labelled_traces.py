"""Write labelled_traces.jsonl.gz: real traces labelled by hand, and copies of them with one known fault each.

    python -m tests.data.make_labelled_traces      needs DISTILL_DATA, default ../shared/data

hand_labels.json says which filters each real trace should fail, from reading it. A copy inherits its base's labels
and gets those of the fault put in. Same data, same file: every choice is drawn from one seed.
"""

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.reasoning import split_reasoning
from tests.data import faults

HERE = Path(__file__).parent
DATA = Path(os.environ.get("DISTILL_DATA", HERE.parents[1] / ".." / "shared" / "data"))
TARGET = HERE / "labelled_traces.jsonl.gz"
JUDGED = ("truncation", "format", "correctness", "repetition", "language", "readability")
MODELS = {
    "deepseek-reasoner (DeepSeek-R1 API)": "R1",
    "QwQ-32B": "QwQ",
    "DeepSeek-R1-Distill-Qwen-32B": "DSQ",
    "s1.1-32B": "s1.1",
}
SOURCE = "tianyi-lab/MiP-Overthinking@4090d3b15e7b"

Row = dict[str, Any]


def real_rows() -> dict[str, Row]:
    """Every real trace by "<model>/<id>", its text in R1's form: reasoning, </think>, response."""
    found = {}
    for name in ("r1_normal", "others_normal"):
        with gzip.open(DATA / "traces" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                model = MODELS[row["model"]]
                text = row["response"]
                if model == "s1.1":  # "think\n … \nanswer\n" in place of tags
                    reasoning, _, response = text.removeprefix("think\n").rpartition("\nanswer\n")
                    text = f"{reasoning}\n</think>\n\n{response}"
                found[f"{model}/{row['id']}"] = {
                    "model": row["model"], "problem": row["prompt"], "answer": row["answer"], "text": text,
                }  # fmt: skip
    return found


def labelled() -> Iterator[Row]:
    rows = real_rows()
    with open(HERE / "hand_labels.json", encoding="utf-8") as file:
        parts = json.load(file)
    clean, long = [], []
    for part, labels in parts.items():
        for identity, label in labels.items():
            row = rows[identity]
            licence = "MIT (repository); problem MIT (GSM8K test)" if "gsm8k" in identity else ""
            yield {
                "id": identity, "part": part, "base": None, "fault": None, **row, "source": SOURCE,
                "licence": licence or "MIT (repository); problem MIT (MATH-500)",
                "fails": sorted(label["fails"]), "near_copy": False, "note": label["note"],
            }  # fmt: skip
            words = len(split_reasoning(row["text"])[0].split())
            if part == "random" and not label["fails"] and row["answer"].isdigit() and words > 200:
                clean.append(identity)
                if words > 600:
                    long.append(identity)
    pick = random.Random(20261123)
    for number, fault in enumerate(faults.FAULTS):
        base = pick.choice(long if fault.long else clean)
        row = rows[base]
        changed = fault.change(row["text"], row["answer"], pick)
        assert changed != row["text"], (fault.name, base)
        licence = "MIT (repository); problem MIT (GSM8K test)" if "gsm8k" in base else ""
        yield {
            "id": f"fault-{number:03}", "part": "faulty", "base": base, "fault": fault.name, **row, "text": changed,
            "source": SOURCE, "licence": licence or "MIT (repository); problem MIT (MATH-500)",
            "fails": sorted(fault.fails), "near_copy": fault.near_copy, "note": fault.note,
        }  # fmt: skip


def main() -> None:
    with open(TARGET, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        for row in labelled():
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

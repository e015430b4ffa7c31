"""One fine-tuning job over several processes (GPUs, nodes, FSDP):  accelerate launch … -m students.launch job.json

job.json: {"settings": {fields of SftSettings, with "optimisation": {…} and, for LoRA, "lora": {…}},
           "train": "train.jsonl", "validation": "validation.jsonl" or null, "out": "folder", "notes": "…"}

The processes are accelerate's; each takes its share of every step's rows, and the result is that of one process.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(job_file: Path) -> None:
    """Run the job of `job_file`. Raises ValueError for a file that is no such job."""
    from students.loop import Optimisation
    from students.lora import Lora
    from students.sft import SftSettings, sft

    job = _read(job_file)
    fields = dict(job["settings"])
    try:
        optimisation = Optimisation(**fields.pop("optimisation"))
        lora = Lora(**fields.pop("lora")) if fields.get("lora") else None
        settings = SftSettings(**fields, optimisation=optimisation, lora=lora)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{job_file}: settings: {error}") from None
    validation = _rows(Path(job["validation"])) if job.get("validation") else None
    train = Path(job["train"])
    sft(settings, _rows(train), validation, Path(job["out"]), _print, job.get("notes", ""), str(train))


def _read(path: Path) -> dict[str, Any]:
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    missing = [name for name in ("settings", "train", "out") if name not in job]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    return job


def _rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _print(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

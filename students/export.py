"""The finished student as an ordinary Hugging Face folder: it loads into transformers, vLLM and lm-eval as it is."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from students.checkpoints import sync_folder, sync_tree

FACTS = "training.json"


def write_folder(folder: Path, model: Any, tokenizer: Any, dtype: str, card: str, facts: dict[str, Any]) -> None:
    """Write safetensors in `dtype`, configs, tokenizer with chat template, README.md and training.json into `folder`.

    `model` is converted in place. Sampling defaults are R1's published ones (temperature 0.6, top-p 0.95).
    """
    import torch
    from transformers import GenerationConfig

    configured = getattr(model.generation_config, "eos_token_id", None)
    others = configured if isinstance(configured, list) else [configured]
    eos_ids = list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *others] if i is not None))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, eos_token_id=eos_ids,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.config.use_cache = True
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def publish(work_dir: Path, export_dir: Path, out_dir: Path) -> None:
    """Move a whole export to its final name at once, then drop the working folder it was made in.

    A kill before the rename leaves the last checkpoint to export from; a kill after it leaves only rubbish to remove.
    """
    if (work_dir / "training_log.jsonl").exists():
        shutil.copyfile(work_dir / "training_log.jsonl", export_dir / "training_log.jsonl")
    sync_tree(export_dir)
    if out_dir.exists():
        replaced = work_dir / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(out_dir, replaced)
    os.replace(export_dir, out_dir)
    sync_folder(out_dir.parent)
    shutil.rmtree(work_dir)


def finished_facts(out_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """training.json of a finished folder that was made from the same inputs, else None."""
    try:
        facts = json.loads((out_dir / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{out_dir / FACTS}: not valid JSON; remove the folder to train again") from None
    return facts if isinstance(facts, dict) and facts.get("fingerprint") == fingerprint else None

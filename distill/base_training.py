"""`distill base train`: pretraining of a student base, from a seed to a Hugging Face folder.

A base is to its student what Qwen2.5-Math was to R1-Distill: it knows the notation and every single step, and has
never solved a full-size problem from its statement to its answer. What it reads is distill.worked.corpus.BaseCorpus.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from distill.files import sha256_json
from distill.training_config import BaseTraining, load_training_config, settings_from

# Steps whose right-hand side follows from their left-hand side alone: columns, and products of small numbers.
_STEP = re.compile(r"^(\d+[-+*]\d+:)(.+)$|^\d+ [a-z ]+ (\d+\*\d+=)(\d+)$")


def run(config_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train, or go on training, and return the finished folder. Raises UserError for what the user got wrong."""
    import torch
    from transformers import AutoTokenizer

    from distill.worked.corpus import BaseCorpus, WorkedProblems
    from distill.worked.tokenizers import build, statement_words
    from students.loop import Optimisation
    from students.pretrain import PretrainSettings, pretrain

    config = load_training_config(config_path, overrides, BaseTraining)
    torch.set_num_threads(config.threads)
    out = Path(config.out)
    full = WorkedProblems(config.families, config.seed)
    small = WorkedProblems(config.small_families, config.seed + 1)
    corpus = BaseCorpus(full, small, config.mixture)
    tokenizer_folder = out.with_name(out.name + ".tokenizer")
    build(config.name, statement_words(full), tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}

    names = {field.name for field in fields(Optimisation)}
    place = f"{config_path}: training"
    chosen = {name: value for name, value in config.training.items() if name in names}
    optimisation = settings_from(chosen, Optimisation, place, seed=config.seed)
    rest = {name: value for name, value in config.training.items() if name not in names}
    settings = settings_from(rest, PretrainSettings, place, optimisation=optimisation)
    result = pretrain(
        settings,
        corpus.__getitem__,
        {"vocab_size": len(tokenizer), **special, **config.model},
        tokenizer_folder,
        out,
        eval_hook=_drill(tokenizer, config),
        log=_print_progress(settings.steps),
        card=_card(config),
        documents_id=sha256_json([config.families, config.small_families, config.mixture, config.seed]),
    )
    print(f"{'already there' if result.skipped else f'done in {result.seconds:,.0f} s'}: {out}")
    return out


def _print_progress(steps: int, every: int = 100) -> Callable[[dict[str, Any]], None]:
    def show(record: dict[str, Any]) -> None:
        if record["step"] % every == 0 or record["step"] == steps or "steps_right" in record:
            right = f"  steps right {record['steps_right']:.3f}" if "steps_right" in record else ""
            print(
                f"step {record['step']}/{steps}  loss {record['loss']:.4f}  lr {record['lr']:.1e}  "
                f"{record['tokens_per_second']:,.0f} tok/s{right}",
                flush=True,
            )

    return show


def _drill(tokenizer: Any, config: BaseTraining) -> Callable[[Any, int], dict[str, Any]]:
    """An eval hook: the share of single steps of held-out problems that the model would write without a mistake."""
    import torch

    from distill.procedural import reasoning_gym_problems
    from distill.worked.corpus import solve

    lines: list[tuple[str, str]] = []
    for problem in reasoning_gym_problems(config.families, config.seed, "heldout", unique=False):
        for line in solve(problem["meta"]["family"], problem["problem"]).lines:
            if step := _STEP.match(line):
                asked = step[1] or line[: step.end(3)]
                lines.append((asked, line[len(asked) :]))
        if len(lines) >= config.drill_lines:
            break

    @torch.no_grad()
    def drill(model: Any, step: int) -> dict[str, Any]:
        right = 0
        for asked, rest in lines:
            given = [tokenizer.eos_token_id, *tokenizer(asked, add_special_tokens=False)["input_ids"]]
            expected = tokenizer(rest, add_special_tokens=False)["input_ids"]
            logits_1TV = model(torch.tensor([given + expected], device=model.device)).logits
            # All tokens most likely given the right ones before them: exactly then greedy decoding writes the line.
            right += logits_1TV[0, len(given) - 1 : -1].argmax(-1).tolist() == expected
        return {"steps_right": right / len(lines)}

    return drill


def _card(config: BaseTraining) -> str:
    families = "\n".join(f"- `{name}`: `{json.dumps(settings)}`" for name, settings in config.families.items())
    small = "\n".join(f"- `{name}`: `{json.dumps(settings)}`" for name, settings in config.small_families.items())
    shares = ", ".join(f"{name} {share:.0%}" for name, share in config.mixture.items())
    return f"""---
license: apache-2.0
library_name: transformers
---
# {config.name}

A *base* model of about a million parameters, made to be fine-tuned on reasoning traces in the demo of this project.
Pretrained from seed {config.seed} by `distill base train configs/students/{config.name}.yaml`, on plain text only:

- `lines`: a few consecutive lines of the working of a full-size problem, without its statement and answer;
- `unfinished`: a full-size statement with the beginning of its working, always short of the last line;
- `ending`: the last line or two of a full-size working and the answer, without the statement;
- `small`: whole worked solutions of much smaller problems.

Documents of each kind: {shares}.

It has seen no problem solved from statement to answer but the much smaller ones (where the ranges below overlap, such
as one-digit sums, these are also the smallest of the full-size ones); no chat form, `<think>` tags or boxed answers;
and nothing of the one problem in ten that is held out (`distill.identity.held_out`).

Full-size problems:

{families}

Much smaller problems:

{small}
"""

"""The student's README.md: what it was made from and how, in the front matter and form the hub reads."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from students.sft import SftResult, SftSettings


def student_card(name: str, settings: "SftSettings", result: "SftResult", notes: str) -> str:
    """`notes` is Markdown from whoever made the dataset: teacher, problems, where the funnel is."""
    optimisation = settings.optimisation
    lora = settings.lora
    method = "all weights" if lora is None else f"LoRA, rank {lora.r}, alpha {lora.alpha:g}, merged"
    passes = f"{settings.epochs:g} epochs" if settings.max_tokens is None else "a fixed number of tokens"
    loss = f"{result.loss:.4f} (last step)"
    if result.validation_loss is not None:
        loss += f", {result.validation_loss:.4f} (validation)"
    left_out = f"; {result.too_long} longer than {settings.max_length} tokens left out" if result.too_long else ""
    # A folder's name says enough; its path is this machine's business.
    base = Path(settings.base).name if Path(settings.base).is_dir() else str(settings.base)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags: [distillation, reasoning, sft]
---

# {name}

`{base}`, fine-tuned on {result.examples} examples with the loss on the response only.

| | |
|---|---|
| base | `{base}` |
| trained | {method} |
| examples | {result.examples}{left_out} |
| tokens seen, without padding | {result.tokens} ({passes}) |
| optimizer steps | {result.steps} of about {settings.tokens_per_step} tokens |
| learning rate | {optimisation.learning_rate:g}, {optimisation.schedule}, warm-up {optimisation.warmup_fraction:g} |
| AdamW | betas {optimisation.betas}, weight decay {optimisation.weight_decay:g}, clip {optimisation.grad_clip:g} |
| number type | {optimisation.dtype} |
| seed | {optimisation.seed} |
| loss | {loss} |

{notes.strip()}

Sample it at temperature 0.6 and top-p 0.95 (the defaults in `generation_config.json`), with the prompt written by
`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.
"""

"""The same model on the same data as TRL's SFTTrainer takes the same steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from students.data import render
from students.sft import plan, sft
from tests.students.rows import rows, settings

EXAMPLES, EPOCHS = 24, 5


def their_training(base: Path, out: Path, accumulate: int) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Losses and gradient norms of full-batch steps, and the weights after them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs = [render(row, tokenizer, "here") for row in rows(EXAMPLES)]
    config = SFTConfig(
        output_dir=str(out), num_train_epochs=EPOCHS, per_device_train_batch_size=EXAMPLES // accumulate,
        gradient_accumulation_steps=accumulate, learning_rate=3e-3, lr_scheduler_type="constant", adam_beta1=0.9,
        adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0, completion_only_loss=True, max_length=None, packing=False,
        logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": text} for prompt, text in pairs]),
    )  # fmt: skip
    trainer.train()
    return [line for line in trainer.state.log_history if "grad_norm" in line], trainer.model.state_dict()


@pytest.mark.parametrize(("base", "packing", "accumulate"), [("qwen", True, 1), ("llama", False, 3)])
def test_losses_gradients_and_weights_follow_trl(
    base: str, packing: bool, accumulate: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    theirs, their_weights = their_training(folder, tmp_path / "trl", accumulate)
    one_epoch = plan(settings(folder, epochs=1), rows(EXAMPLES)).tokens
    how = settings(
        folder, epochs=EPOCHS, tokens_per_step=one_epoch, packing=packing, schedule="constant", warmup_fraction=0.0,
        micro_batch_tokens=700,
    )  # fmt: skip
    sft(how, rows(EXAMPLES), None, tmp_path / "ours")
    ours = [json.loads(line) for line in (tmp_path / "ours" / "training_log.jsonl").read_text().splitlines()]
    assert len(ours) == len(theirs) == EPOCHS
    for mine, their in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(float(their["loss"]), rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(float(their["grad_norm"]), rel=1e-4)
    assert ours[-1]["loss"] < 0.9 * ours[0]["loss"]
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in weights.items():
        moved = (their_weights[name] - start[name]).abs().max()
        assert moved > 0, name
        # Adam divides by the gradient's size: where that is near zero, rounding decides the direction of a step.
        assert (weight - their_weights[name]).abs().mean() < 0.01 * moved, name

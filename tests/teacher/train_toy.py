"""A toy task for the tests of the training loop; run as a script it is the victim of the resume test."""

import random
import sys
from pathlib import Path
from typing import Any

import torch

from teacher import load_model
from teacher.batches import Example
from teacher.model import DeepseekV3
from teacher.train import train
from teacher.train_settings import TrainSettings
from tests.tiny import deepseek_config


def example(index: int) -> Example:
    """Count up from a random digit, modulo ten: the first token is the prompt, every other follows from the last."""
    rng = random.Random(index)
    start, length = rng.randrange(10), rng.randint(5, 40)
    return {"input_ids": [(start + at) % 10 for at in range(length)], "loss_start": 1}


def model(**changes: Any) -> DeepseekV3:
    torch.manual_seed(0)
    return load_model(deepseek_config(vocab_size=32, **changes))


def settings(**changes: Any) -> TrainSettings:
    fields: dict[str, Any] = {
        "total_tokens": 4_000, "tokens_per_step": 256, "seq_len": 128, "micro_tokens": 256, "learning_rate": 1e-2,
        "balance_speed": 0.01, "checkpoint_every": 5, "log_every": 2, "print_every": 0,
    }  # fmt: skip
    return TrainSettings(**(fields | changes))


if __name__ == "__main__":
    torch.set_num_threads(2)
    chosen = settings(ema=0.9, optimizer=sys.argv[2], total_tokens=8_000, tokens_per_step=384, micro_tokens=128)
    train(model(), example, chosen, Path(sys.argv[1]), eval_hook=lambda _, step: {"draw": torch.rand(1).item()})

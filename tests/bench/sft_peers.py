"""The peers of tests.bench.sft_gpu that need packages of their own: liger-kernel, trl and datasets.

trl       SFTTrainer, padding-free on the very rows that ours trains on, bfloat16 autocast over float32 weights as
          ours, Liger's kernels in the layers (`use_liger_kernel`), TRL's own chunked head and loss (its trainer
          takes no other). Attention is ours, as TRL asks for the flash-attn package: cuDNN's where that is installed,
          else torch's flash attention 2. No activations are made anew.
trl-flex, trl-sdpa   the same with transformers' flex attention, and with its masked one
liger     transformers in the plain loop of sft_gpu, padded, with all of Liger's kernels, its fused loss among them
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def liger_taken_back() -> Iterator[None]:
    """Liger puts its kernels into transformers' modules: the sides after these are to find them as they were."""
    from transformers.models.qwen2 import modeling_qwen2

    kept = dict(vars(modeling_qwen2))
    try:
        yield
    finally:
        vars(modeling_qwen2).update(kept)


@liger_taken_back()
def trl(side: str, model: Any, tokens: int, steps: int) -> tuple[list[float], list[float]]:
    """Mean seconds of a step after the warm-up, and the losses."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from students.attention import use_training_attention
    from tests import tiny
    from tests.bench.sft_gpu import WARMUP, rows, synchronize

    inner = model.base_model.model if hasattr(model, "peft_config") else model
    others = {"trl-flex": "flex_attention", "trl-sdpa": "sdpa"}
    if side in others:
        inner.set_attn_implementation(others[side])
    else:
        use_training_attention(inner)
    cuda = next(model.parameters()).is_cuda
    dataset = Dataset.from_list([_row(step) for step in islice(rows(tokens), WARMUP + steps)])
    stamps: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if len(stamps) in (WARMUP - 1, WARMUP + steps - 1):
                synchronize()
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_steps=WARMUP + steps, per_device_train_batch_size=1, learning_rate=1e-6,
            lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0, bf16=cuda,
            use_cpu=not cuda, gradient_checkpointing=False, packing=False, padding_free=True, max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True}, use_liger_kernel=cuda, optim="adamw_torch_fused",
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, shuffle_dataset=False,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tiny.tokenizer(),
                             callbacks=[Watch()])  # fmt: skip
        trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return [(stamps[-1] - stamps[WARMUP - 1]) / steps], losses[WARMUP:]


def _row(step: Any) -> dict[str, list[int]]:
    batch = step.batches[0]
    ids: Tensor = batch.inputs["input_ids"][0]
    labels = torch.full_like(ids, -100)
    keep = batch.inputs["logits_to_keep"] + 1
    labels[keep] = ids[keep]
    lengths = batch.inputs["cu_seq_lens_q"].diff()
    return {"input_ids": ids.tolist(), "labels": labels.tolist(), "seq_lengths": lengths.tolist()}


@liger_taken_back()
def liger(side: str, model: Any, tokens: int, steps: int) -> tuple[list[float], list[float]]:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    from tests.bench.sft_gpu import plain

    inner = model.base_model.model if hasattr(model, "peft_config") else model
    apply_liger_kernel_to_qwen2(model=inner)
    return plain(side, model, tokens, steps)

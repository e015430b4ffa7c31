"""The optimisation loop that fine-tuning and pretraining share: one step of AdamW after another, and nothing lost.

The loss of a step is the mean over all tokens trained on in the whole step, over all its micro-batches and processes:
accumulated gradients are the whole batch's, whatever its layout. (A mean of micro-batch means is not.)

What a step is made of comes from outside, as a function that gives the steps from any point on. Killed at any moment
and started again, the loop continues from its last checkpoint, bit by bit as if nothing had happened on a CPU.
accelerate moves it to a GPU, or to several (`accelerate launch`, FSDP).
"""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.checkpoints import Progress, TrainingLog, latest_checkpoint, save_checkpoint
from students.clipping import clip
from students.compiled import compilation, compile_layers, recompute_layers
from students.ema import Ema
from students.loss import large_head, summed_cross_entropy, without_head
from students.muon import MuonAdamW
from students.packing import IGNORED, Batch
from students.schedule import Schedule, lr_scheduler

if TYPE_CHECKING:
    from accelerate import Accelerator

Record = dict[str, Any]
Log = Callable[[Record], None]
Evaluate = Callable[[nn.Module, int], dict[str, Any]]


@dataclass(frozen=True)
class Optimisation:
    """How weights are updated. Weight decay is on matrices only, as in transformers' trainer."""

    learning_rate: float
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: students.muon
    schedule: Schedule = "multi_step"
    warmup_fraction: float = 0.03
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast, trained weights stay float32
    checkpoint_every: int = 50  # steps
    log_every: int = 1  # steps
    # students.compiled. None: on a GPU, if there are steps enough to earn the compilation back
    compile: Literal["layers", "model", "off"] | None = None
    recompute: bool = False  # a layer's activations are made anew for its gradient: much less memory, a third more work
    ema_decay: float | None = None  # the averaged weights are what is evaluated and saved
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """This process's micro-batches of one step; `loss_tokens` and `tokens` count the step over all processes.

    `slots` counts positions computed, padding included. `position`, if any, is handed back on resuming (JSON).
    """

    batches: list[Batch]
    loss_tokens: int
    tokens: int
    slots: int
    position: Any = None


# steps_from(n, position): the steps n, n+1, …; `position` is step n-1's, or None at the start.
StepsFrom = Callable[[int, Any], Iterable[Step]]


def train(
    accelerator: "Accelerator",
    model: nn.Module,
    steps_from: StepsFrom,
    total_steps: int,
    settings: Optimisation,
    work_dir: Path,
    fingerprint: str,
    log: Log | None = None,
    evaluate: Evaluate | None = None,
    evaluate_at: Collection[int] = (),
) -> Progress:
    """Train `model` in place for `total_steps` steps, or for what a checkpoint in `work_dir` leaves of them.

    work_dir/training_log.jsonl gets a line every `log_every` steps, and `log` the same record. `evaluate(model, step)`
    is called after the steps in `evaluate_at` and its result merged into that record. `fingerprint` stands for
    everything the result depends on; checkpoints of another one are ignored and removed. The last step is always
    checkpointed. Raises ValueError if the loss stops being finite.
    """
    torch.manual_seed(settings.seed)
    optimizer: Any = _optimizer(model, settings)
    scheduler = lr_scheduler(optimizer, settings.schedule, total_steps, settings.warmup_fraction)
    if settings.recompute:
        recompute_layers(model)
    how = compilation(settings.compile, accelerator, total_steps)
    if how == "layers":
        compile_layers(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    forward: Any = torch.compile(model) if how == "model" else model
    ema = Ema(model, settings.ema_decay) if settings.ema_decay is not None else None
    progress = latest_checkpoint(accelerator, work_dir, fingerprint, scheduler, ema) or Progress()
    training_log = TrainingLog(work_dir / "training_log.jsonl", progress.step, accelerator.is_main_process)
    started, earlier = time.monotonic(), progress.seconds
    window_start, window_tokens, window_slots = started, 0, 0
    model.train()

    steps = iter(steps_from(progress.step, progress.position) if progress.step < total_steps else ())
    step = next(steps, None)
    with contextlib.closing(training_log):
        while step is not None:
            summed = _forward_backward(accelerator, model, forward, step, settings.dtype)
            norm_ = clip(accelerator, model, optimizer, settings.grad_clip)
            figures = _read(torch.stack([summed, norm_.to(summed)]))
            rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update()
            number, last = progress.step + 1, progress.step + 1 == total_steps
            upcoming = None if last else next(steps, None)  # made while a GPU is still at work on this one
            total, norm = figures()
            loss = total / max(1, step.loss_tokens)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ValueError(
                    f"training diverged at step {number} (loss {loss}, gradient norm {norm}); lower the learning rate"
                )
            progress.advance(step, loss)
            window_tokens, window_slots = window_tokens + step.tokens, window_slots + step.slots
            if last or number % settings.log_every == 0 or number in evaluate_at:
                now = time.monotonic()
                record: Record = {
                    "step": number, "loss": loss, "lr": rate, "tokens": progress.tokens, "grad_norm": norm,
                    "tokens_per_second": round(window_tokens / (now - window_start), 1),
                    "padding_fraction": round(1 - window_tokens / window_slots, 4),
                }  # fmt: skip
                if evaluate is not None and number in evaluate_at:
                    # Evaluation's lengths and modes would be compiled for anew.
                    averaged = ema.applied() if ema is not None else contextlib.nullcontext()
                    with averaged, torch.compiler.set_stance("force_eager" if how == "layers" else "default"):
                        record |= evaluate(model, number)
                    progress.evaluation = {k: v for k, v in record.items() if k == "validation_loss"}
                    model.train()
                training_log.append(record)
                if log is not None and accelerator.is_main_process:
                    log(record)
                window_start, window_tokens, window_slots = time.monotonic(), 0, 0
            if last or number % settings.checkpoint_every == 0:
                progress.seconds = earlier + time.monotonic() - started
                training_log.sync()
                save_checkpoint(accelerator, work_dir, fingerprint, progress, scheduler, ema)
            step = upcoming
    assert progress.step == total_steps, f"steps ended after {progress.step} of {total_steps}"
    if ema is not None:
        ema.copy_to_model()
    return progress


def _forward_backward(
    accelerator: "Accelerator", model: nn.Module, forward: nn.Module, step: Step, dtype: str
) -> Tensor:
    """Add the gradient of the step's mean loss; returns the loss summed over all processes."""
    # Processes' gradients are averaged, while the mean is over the tokens of all of them.
    scale = accelerator.num_processes / max(1, step.loss_tokens)
    total = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(step.batches):
        is_last = index == len(step.batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            loss = summed_loss(forward, batch.to(accelerator.device), dtype)
            accelerator.backward(loss * scale)
        total += loss.detach()
    summed: Tensor = accelerator.reduce(total)
    return summed


def summed_loss(model: nn.Module, batch: Batch, dtype: str) -> Tensor:
    """Cross-entropy summed over the batch's targets, float32. The model runs under autocast if dtype is bfloat16."""
    with torch.autocast(batch.targets.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        targets = batch.targets.flatten()
        head = large_head(model, len(targets))
        if head is not None:
            with without_head(head):
                hidden = model(**batch.inputs, use_cache=False).logits
            return summed_cross_entropy(hidden.flatten(0, -2), head.weight, targets)
        logits = model(**batch.inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, -2).float(), targets, ignore_index=IGNORED, reduction="sum")


def _read(figures: Tensor) -> Callable[[], list[float]]:
    """Begin to fetch `figures`; the call of the result waits for them, but not for work queued since."""
    if not figures.is_cuda:
        return figures.tolist
    host = torch.empty_like(figures, device="cpu", pin_memory=True)
    host.copy_(figures, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return host.tolist()

    return wait


def _optimizer(model: nn.Module, settings: Optimisation) -> torch.optim.Optimizer:
    rate, betas, decay = settings.learning_rate, settings.betas, settings.weight_decay
    if settings.optimizer == "muon":
        return MuonAdamW(model, lr=rate, betas=betas, weight_decay=decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)

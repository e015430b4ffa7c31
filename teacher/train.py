"""The training loop of the teacher, on one device, in plain torch.

    result = train(model, example_fn, TrainSettings(total_tokens=80_000_000), "runs/tiny-r1")

A step: the gradients of its micro-batches add up, are clipped, AdamW or Muon moves the weights, and then the selection
biases move by the sign of the step's load errors (teacher.balance). It is a function of (weights, optimizer state,
cursor of the example stream) alone, which is what a checkpoint holds: kill the run at any moment, start it again,
and the same weights come out, bit for bit on a CPU with the same number of threads.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from teacher import train_state
from teacher.adamw import AdamW
from teacher.balance import LoadBalance
from teacher.batches import ExampleFn, MicroBatch, StepBatch, step_batches
from teacher.fp8_training import fp8_products
from teacher.model import DeepseekV3
from teacher.muon import MuonAdamW
from teacher.objective import Counts, Objective, Part, trained
from teacher.prefetch import Prefetch
from teacher.schedule import learning_rate_factor
from teacher.train_graph import StepInputs, StepRecorder, obstacle
from teacher.train_log import TrainingLog
from teacher.train_settings import TrainSettings

EvalHook = Callable[[DeepseekV3, int], dict[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """What came out; `last` is the last line of the log, seconds are those of all attempts together."""

    folder: Path
    steps: int
    tokens: int
    seconds: float
    last: dict[str, Any]


def train(
    model: DeepseekV3,
    example_fn: ExampleFn,
    settings: TrainSettings,
    out_dir: str | Path,
    *,
    eval_hook: EvalHook | None = None,
) -> TrainResult:
    """Train `model` (float32, in place) on the examples example_fn(0), example_fn(1), ... and save it to `out_dir`.

    example_fn must be a pure function of its index. eval_hook(model, step) is called with the model in eval mode
    (with the averaged weights if settings.ema is set) every `eval_every` steps and after the last one; what it
    returns goes into the log under "eval". out_dir receives training_log.jsonl, checkpoints/, and at the end the
    model in bf16 (the averaged one if ema is set, which `model` then holds too).

    If out_dir holds a checkpoint, the run continues from it. ValueError if that has other settings or another model,
    if an example does not fit, or if the loss is no longer finite.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with _prepared(model, settings):
        result = _train(_Run(model, settings, out_dir, eval_hook), example_fn)
    model.eval()
    model.save_pretrained(out_dir, dtype=torch.bfloat16)
    return result


@contextmanager
def _prepared(model: DeepseekV3, settings: TrainSettings) -> Iterator[None]:
    """The model with what is not to be trained frozen, and recomputing if it shall; afterwards as it was."""
    frozen = []
    if settings.trainable == "mtp":
        kept = {id(parameter) for module in model.mtp_layers for parameter in module.parameters()}
        frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.recompute = settings.recompute
    try:
        with fp8_products(model) if settings.fp8 else nullcontext():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.recompute = False


def _train(run: "_Run", example_fn: ExampleFn) -> TrainResult:
    model, settings = run.model, run.settings
    stream = step_batches(
        example_fn,
        run.at.cursor,
        rows=settings.tokens_per_step // settings.seq_len,
        micro_rows=settings.micro_tokens // settings.seq_len,
        seq_len=settings.seq_len,
        longest=min(settings.seq_len, model.config.max_position_embeddings),
        depths=len(model.mtp_layers) + settings.mtp_recursion,
    )
    with run, Prefetch(stream) if run.device.type == "cuda" else nullcontext(stream) as batches:
        while not run.ended:
            run.step(next(batches))
    if run.average is not None:
        _copy(run.live, run.average)
    return TrainResult(run.folder, run.at.step, run.at.tokens, run.at.seconds, run.log.last)


class _Run:
    """A run between two steps, and the step."""

    def __init__(self, model: DeepseekV3, settings: TrainSettings, out_dir: Path, eval_hook: EvalHook | None) -> None:
        if any(p.dtype != torch.float32 for p in model.parameters()):
            raise ValueError("the model to train is not float32; for bf16 training keep it so and set bf16=True")
        if not model.mtp_layers and (settings.trainable == "mtp" or settings.mtp_recursion):
            raise ValueError("the model has no MTP module, which trainable: mtp and mtp_recursion ask for")
        self.model, self.settings, self.folder, self.eval_hook = model, settings, out_dir, eval_hook
        self.device = next(model.parameters()).device
        self.balance = LoadBalance(model)
        self.threads = torch.get_num_threads()
        self.pool: ThreadPoolExecutor | None = None
        self.optimizer = _optimizer(model, settings)
        self.live = train_state.weights(model)
        self.average = {n: t.clone() for n, t in self.live.items()} if settings.ema > 0 else None
        self.checkpoints = out_dir / "checkpoints"
        self.at = train_state.Progress()
        newest = train_state.latest(self.checkpoints)
        if newest is not None:
            self.at, stored = train_state.read(newest)
            settings.check_resumes(stored, str(newest))
            train_state.load(newest, model, self.optimizer, self.average)
            print(f"resumed at step {self.at.step} ({self.at.tokens:,} tokens)", flush=True)
        self.recorder = self._recorder()
        self.log = TrainingLog(out_dir / "training_log.jsonl", self.at.step)
        self.unwritten_tokens, self.unwritten_seconds = 0, 0.0

    def __enter__(self) -> "_Run":
        """On a CPU each core takes a micro-batch of its own, instead of all sharing every operator.

        1.25 times the speed on two cores, where most operators are too small to share, and far less loss to other
        processes: no operator waits for a core that is elsewhere. What is not in a micro-batch takes 2% of a step.
        """
        micro_batches = -(-self.settings.tokens_per_step // self.settings.micro_tokens)
        if self.device.type == "cpu" and min(self.threads, micro_batches) > 1:
            torch.set_num_threads(1)
            self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *exc: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self.threads)

    @property
    def ended(self) -> bool:
        return self.at.tokens >= self.settings.total_tokens

    def step(self, batch: StepBatch) -> None:
        """One optimizer step, then what is due after it: evaluation, log, checkpoint."""
        began = time.perf_counter()
        settings, at = self.settings, self.at
        rate, objective = self._rate(), self._objective()
        self.model.train()
        if self.recorder is not None:
            figures = self.recorder.step(objective, batch, rate)
        elif self.device.type == "cpu":
            figures = self._update(objective, batch.micro, batch, rate)
        else:  # from where a recording reads them: the same arithmetic
            inputs = StepInputs(batch, self.device)
            inputs.take(batch, rate)
            figures = self._update(objective, inputs.micro, inputs.counts, inputs.rate)
        at.step, at.tokens, at.cursor = at.step + 1, at.tokens + batch.tokens, batch.cursor
        if self.average is not None:
            # Early on the average forgets faster: it would be made of the initial weights.
            decay = min(settings.ema, (1 + at.step) / (10 + at.step))
            torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), 1 - decay)
        self.log.add(
            {"step": at.step, "tokens": at.tokens}
            | figures
            | {"lr": rate, "padding_fraction": 1 - batch.tokens / batch.positions}
        )
        self.unwritten_tokens += batch.tokens
        self.unwritten_seconds += time.perf_counter() - began
        self._afterwards()

    def _update(
        self, objective: Objective, micro: Sequence[MicroBatch], counts: Counts, rate: float | torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """All of a step that the device computes, but for the average of the weights; returns figures for the log.

        With `counts` and `rate` on the device nothing here asks it for a number, so that it can be recorded.
        """
        whole = self._gradients(objective, micro, counts)
        for parameter, gradient in zip(trained(self.model), whole.gradients, strict=True):
            parameter.grad = gradient
        limit = self.settings.grad_clip or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        max_vio_L = self.balance.update(whole.loads_LE, self.settings.balance_speed)
        return whole.figures | {"grad_norm": grad_norm, "max_vio": max_vio_L, "max_vio_mean": max_vio_L.mean()}

    def _gradients(self, objective: Objective, micro: Sequence[MicroBatch], counts: Counts) -> Part:
        """The sum of the micro-batches' parts, in their order."""

        def part(one: MicroBatch) -> Part:
            return objective.part(self.model, self.balance, one, counts)

        parts = iter(map(part, micro) if self.pool is None else self.pool.map(part, micro))
        whole = next(parts)
        for other in parts:
            whole.add(other)
        return whole

    def _recorder(self) -> StepRecorder | None:
        if self.device.type != "cuda" or not self.settings.graphs:
            return None
        if (reason := obstacle(self.model, self.settings)) is not None:
            print(f"steps are not recorded as CUDA graphs: {reason}", flush=True)
            return None
        return StepRecorder(self._update, self.device)

    def _rate(self) -> float:
        settings = self.settings
        return settings.learning_rate * learning_rate_factor(
            settings.schedule,
            self.at.tokens,
            settings.total_tokens,
            warmup_tokens=settings.warmup_tokens,
            decay_fraction=settings.decay_fraction,
            final_fraction=settings.final_fraction,
        )

    def _objective(self) -> Objective:
        settings = self.settings
        mtp_weight = settings.mtp_weight
        if settings.mtp_weight_late is not None and self.at.tokens >= settings.mtp_late_from * settings.total_tokens:
            mtp_weight = settings.mtp_weight_late
        return Objective(mtp_weight, settings.balance_loss, settings.bf16, settings.mtp_recursion)

    def _afterwards(self) -> None:
        settings, step = self.settings, self.at.step
        evaluate = self.eval_hook is not None and (self.ended or _due(step, settings.eval_every))
        checkpoint = self.ended or _due(step, settings.checkpoint_every)
        show = self.ended or _due(step, settings.print_every)
        if evaluate or checkpoint or show or _due(step, settings.log_every):
            self._write_log(self._evaluate() if evaluate else None)
        if checkpoint:
            stored = dataclasses.asdict(settings)
            train_state.save(self.checkpoints, self.at, stored, self.model, self.optimizer, self.average)
        if show:
            self._print()

    def _write_log(self, evaluation: dict[str, Any] | None) -> None:
        """Write the waiting lines. ValueError if a loss is not finite: no checkpoint is made of such a state."""
        began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the queued steps' time belongs to them
        self.unwritten_seconds += time.perf_counter() - began
        self.at.seconds += self.unwritten_seconds
        speed = self.unwritten_tokens / max(self.unwritten_seconds, 1e-9)
        if evaluation is not None:
            self.log.waiting[-1]["eval"] = evaluation
        rows = self.log.write(tokens_per_second=round(speed, 1), seconds=round(self.at.seconds, 3))
        self.unwritten_tokens, self.unwritten_seconds = 0, 0.0
        for row in rows:
            if not abs(row["loss"]) + row["grad_norm"] < float("inf"):
                raise ValueError(
                    f"at step {row['step']} the loss is {row['loss']} and the gradient's norm {row['grad_norm']}: "
                    "lower learning_rate or lengthen warmup_tokens"
                )

    @torch.no_grad()
    def _evaluate(self) -> dict[str, Any]:
        assert self.eval_hook is not None
        self.model.eval()
        own = {n: t.clone() for n, t in self.live.items()} if self.average is not None else None
        if self.average is not None:
            _copy(self.live, self.average)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            figures = self.eval_hook(self.model, self.at.step)
        torch.set_num_threads(threads)
        if own is not None:
            _copy(self.live, own)
        return figures

    def _print(self) -> None:
        last, settings = self.log.last, self.settings
        speed = last["tokens_per_second"]
        left = (settings.total_tokens - self.at.tokens) / max(speed, 1e-9)
        line = f"step {self.at.step}  {self.at.tokens / settings.total_tokens:6.1%}  loss {last['loss']:.4f}"
        if "mtp_acceptance" in last:
            line += f"  mtp {last['mtp_loss']:.4f} ({last['mtp_acceptance']:.1%})"
        line += f"  lr {last['lr']:.2e}  MaxVio {last['max_vio_mean']:.2f}  {speed:,.0f} tok/s"
        line += f"  {_clock(max(0.0, left))} left"
        print(line + (f"  {last['eval']}" if "eval" in last else ""), flush=True)


def _optimizer(model: DeepseekV3, settings: TrainSettings) -> torch.optim.Optimizer:
    moments: torch.dtype = getattr(torch, settings.moments)
    if settings.optimizer == "muon":
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        embeddings |= {id(model.lm_head.weight)}
        hidden = [p for p in trained(model) if p.dim() >= 2 and id(p) not in embeddings]
        others = [p for p in trained(model) if p.dim() < 2 or id(p) in embeddings]
        return MuonAdamW(
            hidden, others, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay,
            moments=moments,
        )  # fmt: skip
    matrices = [p for p in trained(model) if p.dim() >= 2]
    vectors = [p for p in trained(model) if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if moments != torch.float32:
        return AdamW(groups, lr=settings.learning_rate, betas=settings.betas, moments=moments)
    recordable = model.lm_head.weight.is_cuda
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True, capturable=recordable)


@torch.no_grad()
def _copy(into: dict[str, torch.Tensor], source: dict[str, torch.Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(source[name])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"

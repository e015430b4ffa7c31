"""The settings of a training run, checked once when they are made."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from teacher.schedule import Schedule

# What a resumed run may change: none of it touches the weights that come out.
FREE_TO_CHANGE = {"recompute", "graphs", "eval_every", "log_every", "checkpoint_every", "print_every"}


@dataclass(frozen=True)
class TrainSettings:
    """All of it, with the defaults of a small model on a CPU. ValueError on a value out of bounds."""

    total_tokens: int
    """Budget, non-padding tokens: training ends with the step that reaches it."""
    tokens_per_step: int = 8192
    """Positions of an optimizer step, padding included: tokens_per_step // seq_len rows."""
    seq_len: int = 4096
    """Length of a row that whole examples are packed into; the longest example must fit."""
    micro_tokens: int = 4096
    """Most positions of one forward; a step's gradients accumulate over its micro-batches.

    On a CPU one core works on one micro-batch: a step should have as many as there are cores, or a multiple."""
    data: str = ""
    """Names the data (a hash of its recipe, say): a resumed run must find the same."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: teacher.muon for the matrices, AdamW for the rest."""
    learning_rate: float = 2e-3
    """Peak rate."""
    schedule: Schedule = "multi_step"
    """See teacher.schedule."""
    warmup_tokens: int = 0
    """Linear warm-up over this many tokens."""
    decay_fraction: float = 0.2
    """wsd: share of the budget over which the rate falls."""
    final_fraction: float = 0.1
    """cosine, wsd: the rate at the end, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's (DeepSeek LLM section 2.3)."""
    weight_decay: float = 0.1
    """On matrices only: not on norms, biases or embeddings of one dimension."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 clips nothing."""
    ema: float = 0.0
    """Decay a step of an exponential average of the weights, which is what is evaluated and saved; 0: none."""

    balance_speed: float = 1e-3
    """gamma of the selection bias' sign update (arXiv 2408.15664; V3 section 4.2 takes 0.001); 0 leaves it alone."""
    balance_loss: float = 0.0
    """alpha of the sequence-wise balance loss (V3 eq. 17; there 0.0001); 0: none."""
    mtp_weight: float = 0.3
    """lambda of the multi-token-prediction loss (V3 eq. 25); 0 leaves the MTP modules untrained."""
    mtp_recursion: int = 0
    """Steps that the last MTP module makes on its own output, after each module's first: what a draft of several
    tokens asks of one module. They count as depths: lambda weighs the mean of all."""
    mtp_weight_late: float | None = None
    """lambda from `mtp_late_from` of the budget on; None: the same throughout (V3: 0.3, then 0.1)."""
    mtp_late_from: float = 0.67
    """V3 changed lambda after 10 of 14.8 trillion tokens."""

    trainable: Literal["all", "mtp"] = "all"
    """mtp: only the MTP modules; every other weight, embedding, head and selection biases too, stays as it is."""
    recompute: bool = False
    """Activation checkpointing: a layer keeps only its input, and runs again when its gradient is taken."""
    bf16: bool = False
    """bfloat16 autocast over float32 master weights. Pays on a GPU, and on a CPU with matrix units (AMX)."""
    fp8: bool = False
    """The projections' products, forward and backward, in block FP8: teacher.fp8_training (V3 section 3.3)."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """What the optimizer keeps its averages in; V3 section 3.3.3 takes bfloat16."""
    graphs: bool = True
    """On a GPU a step is recorded as a CUDA graph where that can be (teacher.train_graph). It keeps the memory of one
    step's activations, which the eval hook then cannot use."""
    eval_every: int = 0
    """Steps between calls of the eval hook; 0: only after the last step."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is always written at the end."""
    log_every: int = 10
    """Steps between writes of the log, which has a line for every step."""
    print_every: int = 50
    """Steps between progress lines on the console; 0: none."""

    def __post_init__(self) -> None:
        for name in ("total_tokens", "tokens_per_step", "micro_tokens", "seq_len", "checkpoint_every", "log_every"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("warmup_tokens", "weight_decay", "grad_clip", "balance_speed", "balance_loss", "mtp_weight",
                     "mtp_recursion", "eval_every", "print_every"):  # fmt: skip
            _require(getattr(self, name) >= 0, self, name, "0 or more")
        for name in ("decay_fraction", "final_fraction", "mtp_late_from"):
            _require(0 <= getattr(self, name) <= 1, self, name, "between 0 and 1")
        _require(0 <= self.ema < 1, self, "ema", "at least 0 and below 1")
        _require(self.learning_rate > 0, self, "learning_rate", "above 0")
        _require(self.optimizer in ("adamw", "muon"), self, "optimizer", "adamw or muon")
        _require(self.schedule in get_args(Schedule), self, "schedule", f"one of {', '.join(get_args(Schedule))}")
        _require(self.moments in ("float32", "bfloat16"), self, "moments", "float32 or bfloat16")
        if self.moments == "bfloat16":
            # A step of less than 2^-9 of the average is rounded away: it would stand still.
            _require(max(self.betas) <= 0.99, self, "betas", "at most 0.99 where moments are bfloat16")
        _require(self.trainable in ("all", "mtp"), self, "trainable", "all or mtp")
        if self.trainable == "mtp":
            for name in ("mtp_weight", "mtp_weight_late"):
                _require(getattr(self, name) != 0, self, name, "above 0 where trainable is mtp")
        for name in ("tokens_per_step", "micro_tokens"):
            _require(getattr(self, name) >= self.seq_len, self, name, f"at least seq_len ({self.seq_len})")

    def check_resumes(self, stored: dict[str, Any], where: str) -> None:
        """ValueError if a checkpoint made with `stored` settings would not go on as one run with these."""
        for field in fields(self):
            if field.name in FREE_TO_CHANGE:
                continue
            # A setting that did not exist yet was as its default is.
            ours, theirs = getattr(self, field.name), stored.get(field.name, field.default)
            ours = list(ours) if isinstance(ours, tuple) else ours
            if ours != theirs:
                raise ValueError(
                    f"{where} was written with {field.name}={theirs!r}, this run has {ours!r}: "
                    "train into another folder, or delete that one to start anew"
                )


def _require(good: bool, settings: TrainSettings, name: str, expected: str) -> None:
    if not good:
        raise ValueError(f"training setting {name} is {getattr(settings, name)!r}; expected {expected}")

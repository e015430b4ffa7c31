"""Supervised fine-tuning of a dense base on `messages` rows: loss on the response only, all weights or LoRA.

    result = sft(SftSettings(base="…", optimisation=Optimisation(learning_rate=1e-5)), rows, None, Path("out"))

`out_dir` appears at once, whole, when training is finished; until then everything lives in `<out_dir>.partial`, from
where a second call goes on. A third finds the work done and returns.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from students.data import Example, Examples, Row, build_examples

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from students.loop import Log, Optimisation, Step
    from students.lora import Lora

EVALUATIONS = 5


@dataclass(frozen=True)
class SftSettings:
    """What is trained and how. `max_tokens` (seen, without padding) replaces `epochs`: a baseline's budget."""

    base: str | Path
    optimisation: "Optimisation"
    method: Literal["full", "lora"] = "full"
    lora: "Lora | None" = None
    epochs: float = 2.0
    max_tokens: int | None = None
    max_length: int = 2048
    tokens_per_step: int = 16384
    packing: bool = True
    # Most tokens of one forward pass; None: 2048 on a CPU, 16384 on a GPU, or max_length if that is more.
    micro_batch_tokens: int | None = None
    keep_adapter: bool = True  # LoRA: the adapter alone in out_dir/adapter, beside the merged model


@dataclass(frozen=True)
class SftResult:
    """`tokens` were seen in training (without padding); `seconds` sum over all attempts."""

    folder: Path
    steps: int
    tokens: int
    examples: int
    too_long: int
    seconds: float
    padding_fraction: float
    loss: float
    validation_loss: float | None
    skipped: bool = False


def sft(
    settings: SftSettings,
    train_rows: Sequence[Row],
    val_rows: Sequence[Row] | None,
    out_dir: Path,
    log: "Log | None" = None,
    card_notes: str = "",
    source: str = "training set",
) -> SftResult:
    """Fine-tune, or go on fine-tuning, and write the student to `out_dir`; return at once if it is there already.

    `log` is called with each line of training_log.jsonl. `card_notes` (Markdown) goes into the model card; `source`
    names the rows in errors. Raises ValueError for a base or rows that cannot be trained on, and if training diverges.
    """
    from accelerate import Accelerator

    from students.card import student_card
    from students.export import finished_facts, publish, write_folder
    from students.loop import train
    from students.pretrained import load_tokenizer

    work_dir = out_dir.with_name(out_dir.name + ".partial")
    fingerprint = _fingerprint(settings, train_rows, val_rows or [])
    done = finished_facts(out_dir, fingerprint)
    if done is not None:
        shutil.rmtree(work_dir, ignore_errors=True)
        return SftResult(**done["result"], folder=out_dir, skipped=True)

    tokenizer = load_tokenizer(settings.base)
    data = build_examples(train_rows, tokenizer, settings.max_length, source)
    held_out = build_examples(val_rows, tokenizer, settings.max_length, "validation set") if val_rows else None
    accelerator = Accelerator()
    model, dtype = _load(settings, tokenizer, accelerator)
    steps = _Steps(settings, data.examples, accelerator)
    total = len(steps.plan)
    progress = train(
        accelerator, model, steps.start_at, total, settings.optimisation, work_dir, fingerprint, log,
        evaluate=_validation(settings, held_out, accelerator) if held_out else None,
        evaluate_at={math.ceil(total * (n + 1) / EVALUATIONS) for n in range(EVALUATIONS)} if held_out else (),
    )  # fmt: skip
    result = SftResult(
        out_dir, progress.step, progress.tokens, len(data.examples), data.too_long, round(progress.seconds, 3),
        round(progress.padding_fraction, 4), progress.loss, progress.evaluation.get("validation_loss"),
    )  # fmt: skip
    export_dir = work_dir / "export"
    if accelerator.is_main_process:
        shutil.rmtree(export_dir, ignore_errors=True)
    final = _final_model(accelerator, model, export_dir / "adapter" if settings.keep_adapter else None)
    if accelerator.is_main_process:
        facts = {"fingerprint": fingerprint, "settings": _identity(settings), "result": _facts(result)}
        card = student_card(out_dir.name, settings, result, card_notes)
        write_folder(export_dir, final, tokenizer, dtype, card, facts)
        publish(work_dir, export_dir, out_dir)
    accelerator.wait_for_everyone()
    return result


@dataclass(frozen=True)
class Plan:
    """What sft() will do, known beforehand: its steps, and the tokens seen in them without padding."""

    steps: int
    tokens: int


def plan(settings: SftSettings, train_rows: Sequence[Row], source: str = "training set") -> Plan:
    """The run's size, from the rows and the base's tokenizer alone; `tokens` is a baseline's budget (`max_tokens`).

    Raises ValueError as sft() would for a tokenizer or rows that do not serve.
    """
    from students.pretrained import load_tokenizer

    data = build_examples(train_rows, load_tokenizer(settings.base), settings.max_length, source)
    lengths = [len(example.input_ids) for example in data.examples]
    steps = _plan_steps(settings, lengths)
    return Plan(len(steps), sum(lengths[index] for step in steps for index in step))


def _plan_steps(settings: SftSettings, lengths: list[int]) -> list[list[int]]:
    from students.packing import plan_steps

    seed = settings.optimisation.seed
    return plan_steps(lengths, settings.tokens_per_step, settings.epochs, seed, settings.max_tokens)


class _Steps:
    """This process's share of every step, made of examples as it is asked for."""

    def __init__(self, settings: SftSettings, examples: list[Example], accelerator: "Accelerator") -> None:
        self.examples, self.packing, self.accelerator = examples, settings.packing, accelerator
        self.limit = _micro_batch_tokens(settings, accelerator)
        self.plan = _plan_steps(settings, [len(example.input_ids) for example in examples])

    def start_at(self, number: int, position: Any) -> "Iterator[Step]":
        from students.loop import Step
        from students.packing import collate, layout, without_loss

        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for indices in self.plan[number:]:
            examples = [self.examples[index] for index in indices]
            rows = layout([len(example.input_ids) for example in examples], self.limit, self.packing)
            batches = [collate([examples[i] for i in row], self.packing) for row in rows[rank::processes]]
            if len(batches) < -(-len(rows) // processes):
                # Every process must take part in every reduction: this one repeats a pass without learning from it.
                batches.append(without_loss(collate([examples[i] for i in rows[0]], self.packing)))
            tokens = sum(len(example.input_ids) for example in examples)
            own_slots = sum(batch.slots for batch in batches)
            slots = own_slots if processes == 1 else int(self._sum(own_slots))
            yield Step(batches, sum(example.loss_tokens for example in examples), tokens, slots)

    def _sum(self, value: int) -> Any:
        import torch

        return self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device))


def _micro_batch_tokens(settings: SftSettings, accelerator: "Accelerator") -> int:
    default = 2048 if accelerator.device.type == "cpu" else 16384
    return max(settings.max_length, settings.micro_batch_tokens or default)


def _load(settings: SftSettings, tokenizer: Any, accelerator: "Accelerator") -> tuple[Any, str]:
    """The model to train, and the type its checkpoint had, in which the student is saved."""
    import torch
    from transformers import AutoConfig

    from students.attention import use_training_attention
    from students.lora import Lora, add_adapters
    from students.pretrained import load_model

    bf16 = settings.optimisation.dtype == "bfloat16"
    # Frozen weights need no float32 master copy.
    model = load_model(settings.base, tokenizer, "bfloat16" if bf16 and settings.method == "lora" else "float32")
    if settings.max_length > (model.config.max_position_embeddings or settings.max_length):
        raise ValueError(
            f"max_length: {settings.max_length} is more than the {model.config.max_position_embeddings} positions "
            f"of {settings.base}"
        )
    use_training_attention(model)
    if settings.method == "lora":
        if accelerator.distributed_type.value == "FSDP":
            raise ValueError("method: 'lora' cannot be merged under FSDP yet; launch it without, or use method 'full'")
        torch.manual_seed(settings.optimisation.seed)  # adapters start at random
        model = add_adapters(model, settings.lora or Lora())
    saved = AutoConfig.from_pretrained(settings.base, trust_remote_code=False).dtype
    return model, str(saved).removeprefix("torch.") if saved is not None else "float32"


def _validation(settings: SftSettings, held_out: Examples, accelerator: "Accelerator") -> Any:
    """A function (model, step) -> {"validation_loss": mean over the held-out response tokens}."""
    import torch

    from students.loop import summed_loss
    from students.packing import collate, layout

    examples = held_out.examples
    limit = _micro_batch_tokens(settings, accelerator)
    rows = layout([len(example.input_ids) for example in examples], limit, settings.packing)
    batches = [collate([examples[i] for i in row], settings.packing) for row in rows]
    tokens = sum(example.loss_tokens for example in examples)

    def evaluate(model: "nn.Module", step: int) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            # Every process measures everything: a sharded model needs them all, and the set is small.
            losses = [summed_loss(model, b.to(accelerator.device), settings.optimisation.dtype) for b in batches]
        return {"validation_loss": float(sum(losses)) / tokens}

    return evaluate


def _final_model(accelerator: "Accelerator", model: Any, adapter_dir: Path | None) -> Any:
    """The trained model as a plain transformers model, adapters merged; None but on the main process."""
    import torch

    from students.lora import merge_adapters

    plain = accelerator.unwrap_model(model)
    if accelerator.distributed_type.value != "FSDP":
        if not accelerator.is_main_process:
            return None
        return merge_adapters(plain, adapter_dir) if hasattr(plain, "merge_and_unload") else plain
    state = accelerator.get_state_dict(model)  # gathers the shards: all processes must call it
    if not accelerator.is_main_process:
        return None
    with torch.device("meta"):
        whole = type(plain)(plain.config)
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    return whole


def _identity(settings: SftSettings) -> dict[str, Any]:
    """The settings that decide the result (the base by its content, elsewhere), as JSON."""
    fields = asdict(settings)
    del fields["base"], fields["micro_batch_tokens"]
    for name in ("checkpoint_every", "log_every", "recompute"):
        del fields["optimisation"][name]
    fields["optimisation"]["compile"] = settings.optimisation.compile == "model"  # as folders made earlier have it
    return fields


def _facts(result: SftResult) -> dict[str, Any]:
    fields = asdict(result)
    del fields["folder"], fields["skipped"]
    return fields


def _fingerprint(settings: SftSettings, *sets: Sequence[Row]) -> str:
    """Of everything the student depends on: settings, the base's content, and what is said in every row."""
    from students.pretrained import content_hash

    digest = hashlib.sha256(json.dumps([_identity(settings), content_hash(settings.base)], sort_keys=True).encode())
    for rows in sets:
        digest.update(b"\nset")
        for row in rows:
            digest.update(b"\n" + json.dumps(row.get("messages"), sort_keys=True).encode())
    return digest.hexdigest()

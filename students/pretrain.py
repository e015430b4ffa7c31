"""Pretraining of a small dense base on plain text, as Qwen2.5-Math was before R1-Distill: next token, everywhere.

    pretrain(PretrainSettings(optimisation=Optimisation(learning_rate=3e-3), max_tokens=20_000_000),
             documents, {"model_type": "qwen2", "hidden_size": 128, …}, Path("tokenizer"), Path("out"))

Documents follow each other with end-of-sequence between, in rows of a fixed length, attention plainly causal. The
loop, the checkpoints and the log are those of fine-tuning.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from students.documents import Documents
    from students.loop import Log, Optimisation, Step

EvalHook = Callable[["nn.Module", int], dict[str, Any]]


@dataclass(frozen=True)
class PretrainSettings:
    """`max_tokens` is rounded to whole steps of `rows_per_step` rows of `row_length` tokens."""

    optimisation: "Optimisation"
    max_tokens: int
    row_length: int = 256
    rows_per_step: int = 32
    rows_per_batch: int = 8  # a forward pass; does not change the result beyond rounding
    eval_every: int = 500  # steps; the last step is evaluated too
    save_dtype: str = "bfloat16"

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.row_length

    @property
    def steps(self) -> int:
        return max(1, round(self.max_tokens / self.tokens_per_step))


@dataclass(frozen=True)
class PretrainResult:
    folder: Path
    steps: int
    tokens: int
    seconds: float
    loss: float
    skipped: bool = False


def pretrain(
    settings: PretrainSettings,
    documents: "Documents",
    model: Mapping[str, Any] | Path,
    tokenizer_dir: Path,
    out_dir: Path,
    eval_hook: EvalHook | None = None,
    log: "Log | None" = None,
    card: str = "",
    documents_id: str = "",
) -> PretrainResult:
    """Train from a config (fields of config.json, `model_type` among them) or go on from a checkpoint folder.

    documents(index) -> text must be pure and picklable (it runs in a worker process); `documents_id` is anything that
    changes when they do, so that neither a checkpoint nor a finished folder of others is taken for theirs. `eval_hook`
    (model, step) -> fields for the log is called with the model in eval mode. `card` becomes README.md.

    Returns at once if `out_dir` was made from the same inputs; resumes from `<out_dir>.partial`. Raises ValueError for
    a config or tokenizer that does not fit.
    """
    from accelerate import Accelerator

    from students.export import finished_facts, publish, write_folder
    from students.loop import train
    from students.pretrained import check_vocabulary, content_hash, load_tokenizer

    work_dir = out_dir.with_name(out_dir.name + ".partial")
    identity = _identity(settings)
    source = dict(model) if isinstance(model, Mapping) else content_hash(model)
    inputs = [identity, source, content_hash(tokenizer_dir), documents_id]
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    done = finished_facts(out_dir, fingerprint)
    if done is not None:
        shutil.rmtree(work_dir, ignore_errors=True)
        return PretrainResult(**done["result"], folder=out_dir, skipped=True)

    tokenizer = load_tokenizer(tokenizer_dir)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer_dir}: the tokenizer has no end-of-sequence token to put between documents")
    accelerator = Accelerator()
    network = _build(model, settings)
    check_vocabulary(tokenizer, network.get_input_embeddings().num_embeddings, str(tokenizer_dir))
    total, every = settings.steps, settings.eval_every

    def evaluate(trained: "nn.Module", step: int) -> dict[str, Any]:
        assert eval_hook is not None
        trained.eval()
        return eval_hook(trained, step)

    progress = train(
        accelerator, network, _Steps(settings, documents, tokenizer, accelerator), total, settings.optimisation,
        work_dir, fingerprint, log, evaluate=evaluate if eval_hook else None,
        evaluate_at={*range(every, total + 1, every), total} if eval_hook else (),
    )  # fmt: skip
    result = PretrainResult(out_dir, progress.step, progress.tokens, round(progress.seconds, 3), progress.loss)
    if accelerator.is_main_process:
        export_dir = work_dir / "export"
        shutil.rmtree(export_dir, ignore_errors=True)
        fields = {k: v for k, v in asdict(result).items() if k not in ("folder", "skipped")}
        facts = {"fingerprint": fingerprint, "settings": identity, "result": fields}
        plain = accelerator.unwrap_model(network)
        write_folder(export_dir, plain, tokenizer, settings.save_dtype, card, facts)
        publish(work_dir, export_dir, out_dir)
    accelerator.wait_for_everyone()
    return result


class _Steps:
    """steps_from of the loop: rows from the worker, shared out over the processes."""

    def __init__(self, settings: PretrainSettings, documents: "Documents", tokenizer: Any, accelerator: Any):
        if settings.rows_per_step % accelerator.num_processes:
            raise ValueError(
                f"rows_per_step: {settings.rows_per_step} is no multiple of the {accelerator.num_processes} processes"
            )
        self.settings, self.documents, self.tokenizer = settings, documents, tokenizer
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes

    def __call__(self, number: int, position: Any) -> "Iterator[Step]":
        import torch

        from students.documents import START, read_rows_ahead
        from students.loop import Step
        from students.packing import Batch

        settings, tokens = self.settings, self.settings.tokens_per_step
        rows = read_rows_ahead(
            self.documents, self.tokenizer.backend_tokenizer, self.tokenizer.eos_token_id,
            settings.row_length, settings.rows_per_step, position or START,
        )  # fmt: skip
        for block, after in rows:
            ids_RT = torch.from_numpy(block[self.rank :: self.processes]).long()
            batches = [
                Batch({"input_ids": part[:, :-1]}, part[:, 1:], part[:, 1:].numel())
                for part in ids_RT.split(settings.rows_per_batch)
            ]
            yield Step(batches, tokens, tokens, tokens, after)


def _build(model: Mapping[str, Any] | Path, settings: PretrainSettings) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    from students.attention import use_training_attention
    from students.pretrained import load_model

    if isinstance(model, Mapping):
        fields = dict(model)
        if fields.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(f"model: model_type {fields.get('model_type')!r} is not known to transformers")
        torch.manual_seed(settings.optimisation.seed)
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    else:
        network = load_model(model)
    if settings.row_length > network.config.max_position_embeddings:
        raise ValueError(
            f"row_length: {settings.row_length} is more than the model's {network.config.max_position_embeddings} "
            "positions"
        )
    use_training_attention(network)
    return network


def _identity(settings: PretrainSettings) -> dict[str, Any]:
    fields = asdict(settings)
    del fields["rows_per_batch"], fields["eval_every"]
    for name in ("checkpoint_every", "log_every", "recompute"):
        del fields["optimisation"][name]
    fields["optimisation"]["compile"] = settings.optimisation.compile == "model"  # as folders made earlier have it
    return fields

"""`distill teacher train`: tiny-r1's cold start, from a seed to a Hugging Face folder.

The teacher is trained on endlessly fresh problems with the worked solutions of distill.worked, in the chat form it
will answer in, loss on the response only. No held-out problem is among them (distill.identity.held_out).
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.files import sha256_json, sha256_tree
from distill.shipped import resolve_model
from distill.training_config import TeacherTraining, load_training_config, settings_from

TEMPERATURE, TOP_P = 0.6, 0.95  # R1's published settings


def run(config_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train, or go on training, and return the finished folder. Raises UserError for what the user got wrong."""
    import torch
    from transformers import AutoTokenizer

    from distill.procedural import reasoning_gym_problems
    from distill.worked.corpus import WorkedProblems
    from distill.worked.tokenizers import build, statement_words
    from teacher import load_model
    from teacher.config import DeepseekV3Config
    from teacher.train import train
    from teacher.train_settings import TrainSettings

    config = load_training_config(config_path, overrides, TeacherTraining)
    torch.set_num_threads(config.threads)
    out = Path(config.out)
    problems = WorkedProblems(config.families, config.seed, config.turns)
    start = resolve_model(config.init) if config.init else None
    if start is None:
        build(config.name, statement_words(problems), out)
        tokenizer = AutoTokenizer.from_pretrained(out)
    else:  # the weights know the tokens that they were trained with
        tokenizer = AutoTokenizer.from_pretrained(start)
        tokenizer.save_pretrained(out)
    data = {"families": config.families, "seed": config.seed, "tokenizer": tokenizer.backend_tokenizer.to_str()}
    if config.turns or start:
        data |= {"turns": config.turns, "init": sha256_tree(Path(start)) if start else None}
    identity = sha256_json(data)
    settings = settings_from(config.training, TrainSettings, f"{config_path}: training", data=identity)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vocabulary = {"vocab_size": len(tokenizer), **special}
    fields = {"model_type": "deepseek_v3", **vocabulary, **config.model}
    try:
        architecture = DeepseekV3Config.from_dict(fields)
    except ValueError as error:
        raise UserError(f"{config_path}: model.{error}") from None
    torch.manual_seed(config.seed)
    model = load_model(start or architecture, dtype=torch.float32)
    if dataclasses.replace(model.config, dtype=architecture.dtype) != architecture:
        raise UserError(f"{config_path}: init: {start} has another architecture than model: describes")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{config.name}: {parameters:,} parameters, {settings.total_tokens:,} tokens, into {out}", flush=True)

    held_out = list(islice(reasoning_gym_problems(config.families, config.seed, "heldout"), config.exam_problems))
    result = train(model, Examples(problems, tokenizer), settings, out, eval_hook=exam(tokenizer, held_out))
    (out / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, **special}, indent=2) + "\n",
        encoding="utf-8",
    )
    (out / "README.md").write_text(_card(config, Path(config_path).name, parameters, result.last), encoding="utf-8")
    print(f"done in {result.seconds:,.0f} s: {out}")
    return out


class Examples:
    """example(index) -> token ids of prompt and response, a pure function of the index."""

    def __init__(self, problems: Any, tokenizer: Any) -> None:
        self.problems, self.tokenizer = problems, tokenizer

    def __call__(self, index: int) -> Any:
        example = self.problems[index]
        prompt = prompt_ids(self.tokenizer, example.problem)
        response = self.tokenizer(example.response, add_special_tokens=False)["input_ids"]
        return {"input_ids": [*prompt, *response, self.tokenizer.eos_token_id], "loss_start": len(prompt)}


def prompt_ids(tokenizer: Any, problem: str) -> list[int]:
    """The chat form up to and including `<think>\\n`."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def exam(tokenizer: Any, problems: Sequence[Any]) -> Callable[[Any, int], dict[str, Any]]:
    """An eval hook: accuracy on held-out problems sampled at temperature 0.6, in all and by family."""
    from evals.grading import grade
    from teacher.engine import Engine, Request

    def sit(model: Any, step: int) -> dict[str, Any]:
        engine = Engine(model, tokenizer, batch_size=128, max_len=512)
        requests = [
            Request(
                str(number),
                prompt_ids(tokenizer, problem["problem"]),
                temperature=TEMPERATURE,
                top_p=TOP_P,
                max_tokens=320,
                seed=step * 1000 + number,
            )
            for number, problem in enumerate(problems)
        ]
        right = defaultdict(list)
        for done in engine.generate(requests):
            problem = problems[int(done.id)]
            marked = grade(tokenizer.decode(done.token_ids), problem["answer"] or "", problem["kind"])
            right[problem["meta"]["family"]].append(done.finish_reason == "stop" and marked.verdict == "correct")
        means = {family: round(sum(marks) / len(marks), 3) for family, marks in sorted(right.items())}
        return {"accuracy": round(sum(map(sum, right.values())) / len(problems), 4), "families": means}

    return sit


def _card(config: TeacherTraining, config_name: str, parameters: int, last: dict[str, Any]) -> str:
    start = f", going on from `{config.init}`," if config.init else ""
    families = "\n".join(f"- `{name}`: `{json.dumps(settings)}`" for name, settings in config.families.items())
    return f"""---
license: apache-2.0
library_name: transformers
---
# {config.name}

A DeepSeek-V3-architecture mixture of experts with {parameters:,} parameters (its multi-token-prediction module
included), made to show a whole distillation run on a laptop. It solves small reasoning-gym problems of the families
below, and nothing else.

Trained from seed {config.seed} by `distill teacher train {config_name}`{start} on {last["tokens"]:,}
tokens of worked solutions that small solvers wrote (`distill/worked`): the cold start. One problem in ten, chosen by
the hash of its text (`distill.identity.held_out`), was never trained on. Accuracy on {config.exam_problems} of those at
temperature 0.6, top-p 0.95: {last.get("eval", {}).get("accuracy", "not measured")}.

{families}

Chat form: `<｜User｜>problem<｜Assistant｜><think>\\nworking\\n</think>\\n\\nThe answer is \\boxed{{...}}`.
"""

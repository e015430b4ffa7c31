"""What tests.bench.fp8_training trains on: a recipe's examples as token ids, or bytes of Python's library."""

from __future__ import annotations

import functools
import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

MID = {
    "model_type": "deepseek_v3", "vocab_size": 256, "hidden_size": 512, "intermediate_size": 1536,
    "moe_intermediate_size": 384, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    "first_k_dense_replace": 1, "n_routed_experts": 32, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "q_lora_rank": 256, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 2048, "rope_theta": 10000.0,
}  # fmt: skip
MID_TRAINING = {
    "tokens_per_step": 32768, "micro_tokens": 32768, "seq_len": 1024, "bf16": True, "optimizer": "adamw",
    "learning_rate": 6e-4, "schedule": "wsd", "decay_fraction": 0.3, "final_fraction": 0.0, "warmup_tokens": 1_000_000,
    "mtp_weight": 0.0,
}  # fmt: skip
HELD_OUT = 256_000  # tokens that no run trains on


def prepare(path: Path, recipe: str, tokens: int) -> None:
    """The recipe's first examples that make `tokens` tokens and those held out, its model's fields and settings."""
    import tempfile

    from transformers import AutoTokenizer

    from distill.teacher_training import Examples
    from distill.training_config import TeacherTraining, load_training_config
    from distill.worked.corpus import WorkedProblems
    from distill.worked.tokenizers import build, statement_words

    config = load_training_config(recipe, (), TeacherTraining)
    problems = WorkedProblems(config.families, config.seed, config.turns)
    with tempfile.TemporaryDirectory() as folder:
        build(config.name, statement_words(problems), Path(folder))
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    example = Examples(problems, tokenizer)
    ids: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    while len(ids) < tokens + HELD_OUT:
        one = example(len(ends))
        ids += one["input_ids"]
        starts.append(one["loss_start"])
        ends.append(len(ids))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    fields = {"model_type": "deepseek_v3", "vocab_size": len(tokenizer), **special, **config.model}
    about = json.dumps({"model": fields, "training": config.training})
    np.savez_compressed(path, ids=np.array(ids, np.uint16), starts=starts, ends=ends, about=about)
    print(f"{path}: {len(ends)} examples, {len(ids):,} tokens, {path.stat().st_size / 2**20:.1f} MiB")


class Stored:
    """example(index) of a prepared file, in the order of a seed; held_out(index) of its last HELD_OUT tokens."""

    def __init__(self, path: Path, seed: int) -> None:
        file = np.load(path)
        self.ids, self.starts, self.ends = file["ids"], file["starts"], file["ends"]
        self.about = json.loads(str(file["about"]))
        self.trained = int(np.searchsorted(self.ends, self.ends[-1] - HELD_OUT))
        self.order = np.random.default_rng(seed).permutation(self.trained)

    def __call__(self, index: int) -> Any:
        return self._example(self.order[index % self.trained])

    def held_out(self, index: int) -> Any:
        return self._example(self.trained + index % (len(self.ends) - self.trained))

    def _example(self, at: int) -> Any:
        ids = self.ids[self.ends[at - 1] if at else 0 : self.ends[at]]
        return {"input_ids": ids, "loss_start": int(self.starts[at])}


@functools.cache
def library_text(limit: int) -> np.ndarray:
    """The first `limit` bytes, or a file more."""
    parts, size = [], 0
    for root in dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")):
        for path in sorted(Path(root).rglob("*.py")):
            if size < limit:
                parts.append(path.read_bytes())
                size += len(parts[-1])
    return np.frombuffer(b"".join(parts), np.uint8)


class LibraryText:
    """Pieces of 1,024 bytes of Python's standard library and packages, in the order of a seed; none comes twice."""

    about = {"model": MID, "training": MID_TRAINING}  # noqa: RUF012 (constants)

    def __init__(self, seed: int, limit: int = 160 * 2**20) -> None:
        self.text = library_text(limit)
        pieces = np.random.default_rng(0).permutation(len(self.text) // 1024)
        self.held, trained = np.split(pieces, [HELD_OUT // 1024])
        self.order = np.random.default_rng(seed).permutation(trained)

    def __call__(self, index: int) -> Any:
        assert index < len(self.order), "the text is used up"
        return self._piece(self.order[index])

    def held_out(self, index: int) -> Any:
        return self._piece(self.held[index % len(self.held)])

    def _piece(self, piece: int) -> Any:
        return {"input_ids": self.text[piece * 1024 : piece * 1024 + 1024], "loss_start": 1}

"""FP8 training against bf16 on the same data: how far apart the losses are, beside what another seed makes of it.

    python -m tests.bench.fp8_training prepare tiny.npz --recipe configs/teacher/tiny-r1.yaml --tokens 6000000
    python -m tests.bench.fp8_training run tiny.npz --out runs/fp8 --tokens 6000000 [--seeds 3] [--device cuda] [--jobs]
    python -m tests.bench.fp8_training run --mid --out runs/fp8-mid --minutes 3 --device cuda

`prepare` writes a recipe's examples as token ids, with its model and training settings, so that `run` needs torch
alone: a machine with a GPU may have nothing else. `run` trains with each seed (weights and order of the examples) in
bf16 and in FP8 with bf16 averages, in processes of their own, and compares: mean loss of the last fifth of the steps,
FP8 against bf16 of the same seed, and the spread of bf16 over seeds. DeepSeek-V3 (section 3.3) reports less than 0.25%.
`--mid` is a mixture of experts of some 150M parameters on the text of Python's own library, as bytes; no seed sees an
example twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
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
    "learning_rate": 6e-4, "schedule": "constant", "warmup_tokens": 1_000_000, "mtp_weight": 0.0,
}  # fmt: skip


def prepare(path: Path, recipe: str, tokens: int) -> None:
    """The recipe's first examples that make `tokens` tokens, its model's fields and its training settings."""
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
    while len(ids) < tokens:
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
    """example(index) of a prepared file, in the order of a seed."""

    def __init__(self, path: Path, seed: int) -> None:
        file = np.load(path)
        self.ids, self.starts, self.ends = file["ids"], file["starts"], file["ends"]
        self.order = np.random.default_rng(seed).permutation(len(self.ends))
        self.about = json.loads(str(file["about"]))

    def __call__(self, index: int) -> Any:
        at = self.order[index % len(self.order)]
        ids = self.ids[self.ends[at - 1] if at else 0 : self.ends[at]]
        return {"input_ids": ids.tolist(), "loss_start": int(self.starts[at])}


class LibraryText:
    """Pieces of 1,024 bytes of Python's standard library and packages, in the order of a seed."""

    about = {"model": MID, "training": MID_TRAINING}  # noqa: RUF012 (constants)

    def __init__(self, seed: int, limit: int = 400 * 2**20) -> None:
        parts, size = [], 0
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            if size >= limit:
                break
            parts.append(path.read_bytes())
            size += len(parts[-1])
        self.text = np.frombuffer(b"".join(parts), np.uint8)
        self.order = np.random.default_rng(seed).permutation(len(self.text) // 1024)

    def __call__(self, index: int) -> Any:
        assert index < len(self.order), "the text is used up"
        at = self.order[index] * 1024
        return {"input_ids": self.text[at : at + 1024].tolist(), "loss_start": 1}


def train_one(args: argparse.Namespace) -> None:
    """One run, in this process."""
    import torch

    from teacher import load_model
    from teacher.config import DeepseekV3Config
    from teacher.train import train
    from teacher.train_settings import TrainSettings

    torch.set_num_threads(args.threads)
    example = LibraryText(args.seed) if args.mid else Stored(args.data, args.seed)
    training = {**example.about["training"], "total_tokens": args.tokens, "checkpoint_every": 10**6, "eval_every": 0,
                "print_every": 50}  # fmt: skip
    if args.one == "fp8":
        training |= {"fp8": True, "moments": "bfloat16"}
    if args.device == "cuda" and not args.mid:
        training |= {"micro_tokens": training["tokens_per_step"]}
    torch.manual_seed(args.seed)
    model = load_model(DeepseekV3Config.from_dict(example.about["model"]), dtype=torch.float32, device=args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters", flush=True)
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    assert training.keys() <= known, training.keys() - known
    train(model, example, TrainSettings(**training), args.out / f"{args.one}-{args.seed}")


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """(tokens, loss, tokens a second) of each step."""
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [(row["tokens"], row["loss"], row["tokens_per_second"]) for row in rows]


def run(args: argparse.Namespace) -> None:
    """All runs, `--jobs` at a time, then the comparison of the steps that both sides reached."""
    wanted = [(kind, seed) for seed in range(args.seeds) for kind in ("bf16", "fp8")]
    deadline = time.monotonic() + args.minutes * 60
    running: list[subprocess.Popen[bytes]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for kind, seed in wanted:
        while len([p for p in running if p.poll() is None]) >= args.jobs and time.monotonic() < deadline:
            time.sleep(0.2)
        data = ["--mid"] if args.mid else [str(args.data)]
        command = [sys.executable, "-m", "tests.bench.fp8_training", "run", *data, "--one", kind, "--seed", str(seed),
                   "--out", str(args.out), "--tokens", str(args.tokens), "--device", args.device,
                   "--threads", str(args.threads)]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        with open(args.out / f"{kind}-{seed}.txt", "wb") as file:
            running.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    while any(p.poll() is None for p in running) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in running:
        process.terminate()
        process.wait()
    compare(args, wanted)


def compare(args: argparse.Namespace, wanted: list[tuple[str, int]]) -> None:
    curves = {(kind, seed): losses(args.out / f"{kind}-{seed}") for kind, seed in wanted}
    steps = min(map(len, curves.values()))
    tail = slice(steps - max(1, steps // 5), steps)
    ends = {key: statistics.fmean(loss for _, loss, _ in curve[tail]) for key, curve in curves.items()}
    speeds = {kind: statistics.median(row[2] for (k, _), curve in curves.items() if k == kind for row in curve[5:])
              for kind in ("bf16", "fp8")}  # fmt: skip
    pairs = [ends["fp8", seed] / ends["bf16", seed] - 1 for seed in range(args.seeds)]
    plain = [ends["bf16", seed] for seed in range(args.seeds)]
    print(f"{steps} steps, {curves['bf16', 0][steps - 1][0]:,} tokens; loss of the last fifth of the steps")
    for seed, pair in enumerate(pairs):
        print(f"  seed {seed}: bf16 {ends['bf16', seed]:.5f}  fp8 {ends['fp8', seed]:.5f}  {pair:+.3%}")
    spread = (max(plain) - min(plain)) / statistics.fmean(plain)
    print(f"fp8 against bf16: {statistics.fmean(pairs):+.3%}; bf16 over seeds: {spread:.3%} from lowest to highest")
    print(f"tokens a second, median: bf16 {speeds['bf16']:,.0f}, fp8 {speeds['fp8']:,.0f}")
    figures = {
        "steps": steps, "device": args.device, "mid": args.mid, "pairs": pairs, "bf16_spread": spread, "speed": speeds,
        "curves": {f"{kind}-{seed}": [[t, round(x, 5)] for t, x, _ in c[:steps]] for (kind, seed), c in curves.items()},
    }  # fmt: skip
    (args.out / "comparison.json").write_text(json.dumps(figures) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="See the module's text.")
    parser.add_argument("what", choices=["prepare", "run"])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--recipe", default="configs/teacher/tiny-r1.yaml")
    parser.add_argument("--tokens", type=int, default=6_000_000)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8-training"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=1e6, help="all runs are stopped then, and compared so far")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mid", action="store_true")
    parser.add_argument("--one", choices=["bf16", "fp8"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "prepare":
        prepare(args.data, args.recipe, args.tokens)
    elif args.one:
        train_one(args)
    else:
        run(args)


if __name__ == "__main__":
    main()

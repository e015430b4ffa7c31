"""Speed of the teacher's training loop on made-up examples of 60 to 260 tokens, in non-padding tokens a second.

    python -m tests.bench.train                    # 2.4M parameters, rows of 4096, bf16, all cores
    python -m tests.bench.train --device cuda --set tokens_per_step=65536 --set micro_tokens=65536
    python -m tests.bench.train --set bf16=false --set seq_len=512 --steps 10

Prints the median over the steps after the first two (which compile kernels), with the slowest and the fastest. Other
work on the machine shows: on two cores, compare only what ran side by side, or give the run a real-time priority.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from teacher import load_model
from teacher.batches import Example
from teacher.config import DeepseekV3Config
from teacher.train import train
from teacher.train_settings import TrainSettings

VOCABULARY = 256
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 512, "moe_intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6, "n_shared_experts": 1,
    "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 1,
    "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "max_position_embeddings": 1024, "num_nextn_predict_layers": 1,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "mscale": 1.0,
                     "mscale_all_dim": 1.0},
}  # fmt: skip


def example(index: int) -> Example:
    rng = random.Random(index)
    return {"input_ids": rng.choices(range(VOCABULARY), k=rng.randint(60, 260)), "loss_start": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a training setting")
    parser.add_argument("--model", action="append", default=[], metavar="KEY=VALUE", help="a field of the model config")
    arguments = parser.parse_args()

    def parsed(pairs: list[str]) -> dict[str, Any]:
        return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = load_model(DeepseekV3Config(**(MODEL | parsed(arguments.model))), device=arguments.device)
    fields: dict[str, Any] = {
        "total_tokens": 1,
        "bf16": True,
        "print_every": 0,
        "log_every": 1,
        "warmup_tokens": 100_000,
    }
    fields |= parsed(arguments.set)
    per_step = fields.get("tokens_per_step", TrainSettings.tokens_per_step)
    settings = TrainSettings(**(fields | {"total_tokens": int(per_step * (arguments.steps - 0.5) * 0.97)}))
    with tempfile.TemporaryDirectory() as folder:
        train(model, example, settings, folder)
        rows = [json.loads(line) for line in (Path(folder) / "training_log.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows[2:]]
    padding = sum(row["padding_fraction"] for row in rows) / len(rows)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} CPU threads"
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {where}, torch {torch.__version__}: "
        f"{median(speeds):,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f}), padding {padding:.1%}"
    )


if __name__ == "__main__":
    main()

"""Speed of fine-tuning on a GPU: our step and plain transformers on the same examples, as a share of the GPU's rate.

    python -m tests.bench.sft_gpu [full-1.5b] [lora-7b] [--tokens 16384] [--steps 6] [--out sft_gpu.json]

Weights are random in the shapes of Qwen2.5-1.5B and 7B, tokens too; examples have lengths as R1's traces have
(log-normal, median 3,000 tokens, at most `--tokens`). Ours packs them into a row of `--tokens`; transformers gets a row
an example,
padded to the longest of a batch of as many slots, with its own loss and scaled_dot_product_attention, AdamW alike.

Counted are tokens that are not padding. MFU: (6 x weights that multiply + 12 x layers x hidden x mean context) FLOP a
token over the datasheet's dense bf16 rate, and over the rate that this very GPU reaches in an 8192^3 product; LoRA's
frozen weights have no gradient of their own, so 4 instead of 6.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPES = {
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip
DATASHEET = {"H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s, SXM
VOCABULARY = 151_936


def build(shape: str, lora: bool) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=32768, **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora else torch.float32)
    if lora:
        from students.lora import Lora, add_adapters

        model = add_adapters(model, Lora())
    return model.train()


def lengths_of(tokens: int, seed: int) -> list[int]:
    """Lengths that fill a row of `tokens`."""
    draw = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(int(min(left, max(64, draw.lognormal(np.log(3000), 0.7)))))
    return lengths


def ours(model: Any, tokens: int) -> Callable[[list[int]], float]:
    from students.attention import use_training_attention
    from students.data import Example
    from students.loop import summed_loss
    from students.packing import collate

    use_training_attention(getattr(model, "base_model", model) if hasattr(model, "peft_config") else model)

    def step(lengths: list[int]) -> float:
        examples = [Example(torch.randint(VOCABULARY, (n,)).tolist(), 32) for n in lengths]
        batch = collate(examples, True).to(torch.device("cuda"))
        loss = summed_loss(model, batch, "bfloat16") / sum(n - 32 for n in lengths)
        loss.backward()
        return float(loss.detach())

    return step


def plain(model: Any, tokens: int) -> Callable[[list[int]], float]:
    """Rows of one example, as many at a time as `tokens` slots hold; the loss is transformers'."""

    def step(lengths: list[int]) -> float:
        total = 0.0
        for batch in padded(sorted(lengths), tokens):
            ids = torch.randint(VOCABULARY, (len(batch), max(batch)), device="cuda")
            real = torch.arange(max(batch), device="cuda") < torch.tensor(batch, device="cuda")[:, None]
            labels = torch.where(real, ids, -100)
            labels[:, :32] = -100
            with torch.autocast("cuda", torch.bfloat16):
                loss: Tensor = model(input_ids=ids, attention_mask=real.long(), labels=labels, use_cache=False).loss
            share = sum(batch) / sum(lengths)
            (loss * share).backward()
            total += float(loss.detach()) * share
        return total

    return step


def padded(lengths: list[int], slots: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for length in lengths:
        if batch and (len(batch) + 1) * length > slots:
            yield batch
            batch = []
        batch.append(length)
    yield batch


def measure(side: str, shape: str, lora: bool, tokens: int, steps: int) -> dict[str, Any]:
    model = build(shape, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    step = {"ours": ours, "transformers": plain}[side](model, tokens)
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for number in range(steps + 2):
        lengths = lengths_of(tokens, number)
        torch.cuda.synchronize()
        began = time.perf_counter()
        losses.append(step(lengths))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    config = model.config
    own = sum(p.numel() for p in trained)
    weights = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n and "embed_tokens" not in n)
    weights += config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    squares = [sum(n * n for n in lengths_of(tokens, s)) / tokens for s in range(2, steps + 2)]
    context = statistics.fmean(squares) / 2
    flop = (4 if lora else 6) * weights + 12 * config.num_hidden_layers * config.hidden_size * context
    speed = tokens / statistics.median(seconds[2:])
    return {
        "side": side, "tokens_per_second": speed, "seconds": [round(s, 3) for s in seconds[2:]], "trained": own,
        "weights": weights, "flop_per_token": flop, "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "losses": [round(x, 3) for x in losses],
    }  # fmt: skip


def bf16_rate() -> float:
    """FLOP/s of an 8192^3 product, the best of five."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 5 * 2 * 8192**3 / (start.elapsed_time(end) / 1e3))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="See the module's text.")
    parser.add_argument("runs", nargs="*", default=["full-1.5b", "lora-7b"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    name = torch.cuda.get_device_name()
    sheet = next((rate for key, rate in DATASHEET.items() if key in name), None)
    rate = bf16_rate()
    print(f"{name}, torch {torch.__version__}; bf16 product {rate / 1e12:.0f} TFLOP/s")
    rows = []
    for run in args.runs:
        method, _, shape = run.partition("-")
        for side in ("ours", "transformers"):
            try:
                row = {"run": run} | measure(side, shape, method == "lora", args.tokens, args.steps)
            except torch.OutOfMemoryError:
                row = {"run": run, "side": side, "error": "out of memory"}
            gc.collect()
            torch.cuda.empty_cache()
            rows.append(row)
            if "error" in row:
                print(f"{run:<10} {side:<13} {row['error']}", flush=True)
                continue
            done = row["flop_per_token"] * row["tokens_per_second"]
            row["mfu"] = done / sheet if sheet else None
            shares = f"{done / rate:.1%} of the product's rate" + (f", MFU {done / sheet:.1%}" if sheet else "")
            print(f"{run:<10} {side:<13} {row['tokens_per_second']:>9,.0f} tokens/s  {shares}  "
                  f"{row['peak_gib']:.0f} GiB", flush=True)  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({"gpu": name, "bf16_rate": rate, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

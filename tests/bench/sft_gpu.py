"""Speed of fine-tuning on a GPU: our loop and its peers on examples alike, as a share of the GPU's rate.

    python -m tests.bench.sft_gpu [full-1.5b] [lora-7b:ours,trl …] [--sides ours …] [--tokens 16384] [--out FILE]
    python -m tests.bench.sft_gpu full-tiny --device cpu --tokens 512   # a rehearsal

Weights are random in the shapes of Qwen2.5-1.5B and 7B, tokens too; examples have lengths as R1's traces have
(log-normal, median 3,000 tokens, at most `--tokens`), and fill a row of `--tokens` a step.

    ours          students.loop.train as `distill` calls it, from making the row of tokens to the updated weights
    eager         the same, with nothing compiled and all logits held: the loop as it was
    recompute     ours, with activations made anew in the backward pass
    transformers  a row an example, padded to the longest of a batch of as many slots, with its own loss and
                  scaled_dot_product_attention, AdamW alike
    liger         the same with Liger's kernels and its fused loss; see tests.bench.sft_peers
    trl, trl-flex TRL's SFTTrainer on the same rows, with Liger's kernels; see tests.bench.sft_peers

Counted are tokens that are not padding, over the whole time of the steps after the first four. MFU: (6 x weights that
multiply + 12 x layers x hidden x mean context) FLOP a token over the datasheet's dense bf16 rate, and over the rate
that this very GPU reaches in an 8192^3 product; LoRA's frozen weights have no gradient of their own, so 4 instead of 6.
Nothing made anew in a backward pass counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.bench.kernels import about
from tests.bench.sft_profile import StepProfile

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip
DATASHEET = {"H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s, SXM
VOCABULARY = 151_936
# Rows of the steps that are not timed: they compile, and show the attention every size class of its plans.
WARM_ROWS = (3, 7, 0, 8)
WARMUP = len(WARM_ROWS)


def build(shape: str, lora: bool, device: str) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=32768, **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora else torch.float32)
    if lora:
        from students.lora import Lora, add_adapters

        model = add_adapters(model, Lora())
    return model.train()


def lengths_at(tokens: int, step: int) -> list[int]:
    return lengths_of(tokens, WARM_ROWS[step] if step < WARMUP else max(WARM_ROWS) + 1 + step - WARMUP)


def lengths_of(tokens: int, seed: int) -> list[int]:
    """Lengths that fill a row of `tokens`."""
    draw = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(int(min(left, max(64, draw.lognormal(np.log(3000), 0.7)))))
    return lengths


class _EnoughError(Exception):
    pass


def ours(
    side: str, model: Any, tokens: int, steps: int, profile: StepProfile | None = None
) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps after WARMUP; then one more step for `profile`."""
    from accelerate import Accelerator

    from students import loss
    from students.attention import use_training_attention
    from students.loop import Optimisation, train

    use_training_attention(getattr(model, "base_model", model) if hasattr(model, "peft_config") else model)
    settings = Optimisation(
        learning_rate=1e-6, dtype="bfloat16", schedule="constant", checkpoint_every=10**9,
        compile="off" if side == "eager" else "layers", recompute=side == "recompute",
    )  # fmt: skip
    seconds: list[float] = []
    losses: list[float] = []
    last = time.perf_counter()

    def log(record: dict[str, Any]) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds.append(now - last)
        losses.append(record["loss"])
        last = now
        if len(seconds) == WARMUP + steps and profile is not None:
            profile.start()
        elif len(seconds) >= WARMUP + steps:
            raise _EnoughError

    plain_logits = loss.PLAIN_LOGITS
    loss.PLAIN_LOGITS = 10**18 if side == "eager" else plain_logits
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(Accelerator(), model, lambda *_: rows(tokens), 1000, settings, Path(folder), "bench", log)
    except _EnoughError:
        pass
    finally:
        loss.PLAIN_LOGITS = plain_logits
    if profile is not None:
        profile.stop()
    chosen = slice(WARMUP, WARMUP + steps)
    return seconds[chosen], losses[chosen]


def rows(tokens: int) -> Iterator[Any]:
    from students.data import Example
    from students.loop import Step
    from students.packing import collate

    draw = np.random.default_rng(0)
    number = 0
    while True:
        lengths = lengths_at(tokens, number)
        examples = [Example(draw.integers(0, VOCABULARY, n).tolist(), 32) for n in lengths]
        yield Step([collate(examples, True)], sum(n - 32 for n in lengths), tokens, tokens)
        number += 1


def plain(side: str, model: Any, tokens: int, steps: int) -> tuple[list[float], list[float]]:
    """Rows of one example, as many at a time as `tokens` slots hold; the loss is transformers'."""
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step(lengths: list[int]) -> float:
        total = 0.0
        for batch in padded(sorted(lengths), tokens):
            ids = torch.randint(VOCABULARY, (len(batch), max(batch)), device=device)
            real = torch.arange(max(batch), device=device) < torch.tensor(batch, device=device)[:, None]
            labels = torch.where(real, ids, -100)
            labels[:, :32] = -100
            with torch.autocast(device.type, torch.bfloat16):
                loss: Tensor = model(input_ids=ids, attention_mask=real.long(), labels=labels, use_cache=False).loss
            share = sum(batch) / sum(lengths)
            (loss * share).backward()
            total += float(loss.detach()) * share
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    seconds, losses = [], []
    for number in (0, 1, *range(WARMUP, WARMUP + steps)):
        lengths = lengths_at(tokens, number)
        synchronize()
        began = time.perf_counter()
        losses.append(step(lengths))
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[2:], losses[2:]


def padded(lengths: list[int], slots: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for length in lengths:
        if batch and (len(batch) + 1) * length > slots:
            yield batch
            batch = []
        batch.append(length)
    yield batch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def side_of(name: str) -> Callable[..., tuple[list[float], list[float]]]:
    if name in ("ours", "eager", "recompute"):
        return ours
    if name in ("trl", "trl-flex", "trl-sdpa", "liger"):
        from tests.bench import sft_peers

        return sft_peers.liger if name == "liger" else sft_peers.trl
    return plain


def measure(
    side: str, shape: str, lora: bool, tokens: int, steps: int, device: str, profile: StepProfile | None = None
) -> dict[str, Any]:
    model = build(shape, lora, device)
    config = model.config
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n and "embed_tokens" not in n)
    weights += config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    more = {"profile": profile} if profile is not None and side_of(side) is ours else {}
    seconds, losses = side_of(side)(side, model, tokens, steps, **more)
    squares = [sum(n * n for n in lengths_at(tokens, s)) / tokens for s in range(WARMUP, WARMUP + steps)]
    context = statistics.fmean(squares) / 2
    flop = (4 if lora else 6) * weights + 12 * config.num_hidden_layers * config.hidden_size * context
    return {
        "side": side, "tokens_per_second": tokens * len(seconds) / sum(seconds), "trained": own, "weights": weights,
        "seconds": [round(s, 4) for s in seconds], "flop_per_token": flop, "mean_context": context,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "losses": [round(x, 3) for x in losses],
    }  # fmt: skip


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    parser.add_argument("--sides", nargs="+", default=["ours", "transformers"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--attention", choices=["best", "flash"], default="best", help="flash: as without cuDNN's package"
    )
    parser.add_argument("--profile", action="store_true", help="of one more step of ours: kernels by kind")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where the checkout has no git")
    parser.add_argument("--versions", nargs="*", default=[], help="packages whose versions the file should name")
    args = parser.parse_args()
    if args.attention == "flash":
        from students import attention_cudnn

        attention_cudnn.available = lambda: False
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    sheet = next((rate for key, rate in DATASHEET.items() if key in name), None)
    rate = bf16_rate() if args.device == "cuda" else float("nan")
    print(f"{name}, torch {torch.__version__}; bf16 product {rate / 1e12:.0f} TFLOP/s")
    facts: dict[str, Any] = {"about": about(args.commit)} if args.device == "cuda" else {"about": {}}
    facts["about"].pop("command", None)
    facts |= {"command": " ".join(["python -m tests.bench.sft_gpu", *args.runs, "--steps", str(args.steps)])}
    facts |= {"versions": {name: installed(name) for name in ("transformers", *args.versions)}}
    found = []
    for run in args.runs:
        run, _, sides = run.partition(":")
        method, _, shape = run.partition("-")
        for side in sides.split(",") if sides else args.sides:
            began = time.perf_counter()
            profile = StepProfile() if args.profile else None
            lora = method == "lora"
            try:
                row = {"run": run} | measure(side, shape, lora, args.tokens, args.steps, args.device, profile)
            except torch.OutOfMemoryError:
                row = {"run": run, "side": side, "error": "out of memory"}
            except Exception:
                if side_of(side) is ours:
                    raise
                row = {"run": run, "side": side, "error": traceback.format_exc()}  # a peer must not end the others
            gc.collect()
            torch.compiler.reset()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            found.append(row)
            if "error" in row:
                print(f"{run:<10} {side:<13} {row['error']}", flush=True)
                continue
            done = row["flop_per_token"] * row["tokens_per_second"]
            row["mfu"] = done / sheet if sheet else None
            shares = f"{done / rate:.1%} of the product's rate" + (f", MFU {done / sheet:.1%}" if sheet else "")
            print(f"{run:<10} {side:<13} {row['tokens_per_second']:>9,.0f} tokens/s  {shares}  "
                  f"{row['peak_gib'] or 0:.0f} GiB  losses {row['losses'][0]} to {row['losses'][-1]}  "
                  f"steps {row['seconds']} s  in all {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
            if profile is not None and hasattr(profile, "wall"):
                print(profile.table(), flush=True)
            if args.out:
                args.out.write_text(json.dumps(facts | {"bf16_rate": rate, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

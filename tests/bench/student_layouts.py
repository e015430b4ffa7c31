"""Packed rows against length-sorted padded ones: non-padding tokens a second of forward and backward, medians.

    python -m tests.bench.student_layouts [float32|bfloat16]

On a GPU a Qwen2 of 0.3B parameters at lengths like reasoning traces' (log-normal, up to 8,000 tokens); on a CPU the
demo's size (1M parameters, 60 to 260 tokens).
"""

import random
import statistics
import sys
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from students.attention import use_training_attention
from students.data import Example
from students.loop import summed_loss
from students.packing import Batch, collate, layout


def main(dtype: str) -> None:
    torch.manual_seed(0)
    draw, gpu = random.Random(0), torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    size = (1024, 16, 16, 4096, 32000) if gpu else (128, 5, 4, 384, 400)
    config = Qwen2Config(
        hidden_size=size[0], num_hidden_layers=size[1], num_attention_heads=size[2], num_key_value_heads=size[2] // 2,
        intermediate_size=size[3], vocab_size=size[4], max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(device)
    use_training_attention(model)
    lengths = [draw.randint(60, 260) for _ in range(25)]
    if gpu:
        lengths = [60 + int(min(8000, draw.lognormvariate(7, 0.8))) for _ in range(24)]
    examples = [Example([draw.randrange(size[4]) for _ in range(n)], draw.randint(15, 45)) for n in lengths]
    speeds: dict[str, list[float]] = {}
    for _ in range(5):
        for packing in (True, False):
            rows = layout(lengths, 16384 if gpu else 2048, packing)
            batches = [collate([examples[i] for i in row], packing).to(device) for row in rows]
            for _ in range(2):
                started = time.perf_counter()
                loss = sum(_backward(model, batch, dtype) for batch in batches)
                model.zero_grad()
                seconds = time.perf_counter() - started
            slots = sum(batch.slots for batch in batches)
            name = f"{'packed' if packing else 'padded'}  {len(rows)} passes  padding {1 - sum(lengths) / slots:.3f}"
            speeds.setdefault(f"{name}  loss {loss / sum(lengths):.4f}", []).append(sum(lengths) / seconds)
    for name, found in speeds.items():
        print(f"{dtype}  {name}  {statistics.median(found):.0f} tokens/s ({min(found):.0f} to {max(found):.0f})")


def _backward(model: Qwen2ForCausalLM, batch: Batch, dtype: str) -> float:
    loss = summed_loss(model, batch, dtype)
    loss.backward()
    return float(loss.detach())  # waits for the device


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bfloat16")

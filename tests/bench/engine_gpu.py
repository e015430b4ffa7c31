"""The engine on a GPU: tokens/s against concurrency; by CUDA graphs or not, MLA decode by the kernel or in torch, MTP.

    python -m tests.bench.engine_gpu --json engine_gpu.json [--quick]

Two models: tiny-r1, and a model of DeepSeek-V2-Lite's shape (15.7B parameters, 2.7B activated; random weights, with
the output layer scaled up so that its distributions are as peaked as a trained model's). tiny-r1 gets problems that it
knows and stops when it is done, the other one 128 random tokens, and writes 128; temperature 0.6, top-p 0.95. In the
rows of 3,968 prompt tokens all requests have the same prompt, computed once: what is told there is decoding over it.
What is told is new tokens a second of the whole call, prefill included, the best of the rounds after one that is not
counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from teacher import load_model
from teacher.config import DeepseekV3Config
from teacher.engine import Engine
from teacher.model import DeepseekV3
from teacher.quantized_experts import quantize_experts
from teacher.quantized_linear import quantize_linears
from teacher.requests import Request

PROMPT, NEW, LONG = 128, 128, 3968


FORMS = ((False, False), (True, False), (True, True))  # (by graphs, by the kernel)


def lite() -> DeepseekV3:
    """DeepSeek-V2-Lite's sizes (its config.json), with V3's gate; weights drawn on the GPU."""
    config = DeepseekV3Config(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None, num_nextn_predict_layers=0,
    )  # fmt: skip
    model = DeepseekV3.on_meta(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model = model.to_empty(device="cuda")
    model.fill_rotation_table()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                tensor.fill_(0.0 if "bias" in name else 1.0)
            else:
                tensor.normal_(std=0.02 if "lm_head" not in name else 0.2)
    return model


def quantized(model: DeepseekV3, weights: str) -> DeepseekV3:
    """`model` with its experts, or all that FP8 checkpoints hold so, in FP8; "model": as it is."""
    if weights != "model":
        quantize_experts(model, shared=weights == "fp8")
    if weights == "fp8":
        quantize_linears(model)
    torch.cuda.empty_cache()
    return model


def requests(count: int, vocabulary: int, length: int, prompts: list[list[int]] | None) -> list[Request]:
    rng = random.Random(count)
    return [
        Request(
            str(number), prompts[number] if prompts else [rng.randrange(vocabulary) for _ in range(PROMPT)],
            max_tokens=length, seed=number, stop_ids=None if prompts and len(prompts[0]) < LONG else [],
        )
        for number in range(count)
    ]  # fmt: skip


def speed(model: DeepseekV3, count: int, rounds: int, prompts: list[list[int]] | None, **settings: Any) -> Any:
    length = max(512, len(prompts[0]) + NEW if prompts else 0)
    engine = Engine(model, None, count, length, cache_tokens=count * length, **settings)
    found = []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        made = sum(len(done.token_ids) for done in engine.generate(requests(count, 400, NEW, prompts)))
        torch.cuda.synchronize()
        found.append(made / (time.perf_counter() - started))
    stats = engine.stats()
    accepted = round(stats.accepted / stats.drafted, 4) if stats.drafted else None
    return {"tokens_per_second": round(max(found[1:])), "accepted": accepted, "runs_in": engine.runs_in}


def real_prompts(count: int) -> list[list[int]]:
    """Problems that tiny-r1 knows, in its chat form: its draft is worth nothing on random text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("teacher/models/tiny-r1")
    rng = random.Random(0)
    texts = [
        f"Solve the following multiplication: {rng.randrange(11, 99)} * {rng.randrange(11, 99)}. Give only the result "
        "as your final answer."
        for _ in range(count)
    ]
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
        for t in texts
    ]  # fmt: skip
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--json", type=Path)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--commit", help="name of the code under test, where git does not know it")
    options.add_argument("--only", choices=("tiny", "lite"))
    chosen = options.parse_args()
    commit = chosen.commit
    if commit is None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    about = {"gpu": driver, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}
    found: dict[str, Any] = {"about": about, "rows": []}
    rounds = 1 if chosen.quick else 3

    def measure(name: str, model: DeepseekV3, count: int, prompts: list[list[int]] | None, **settings: Any) -> None:
        row = {"model": name, "concurrency": count, **settings, **speed(model, count, rounds, prompts, **settings)}
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps(found, indent=1))

    prompts = real_prompts(256)
    for dtype in ("float32", "bfloat16") if chosen.only != "lite" else ():
        tiny = load_model("teacher/models/tiny-r1", dtype=dtype, device="cuda")
        for count in (1, 16, 256) if chosen.quick else (1, 4, 16, 64, 256):
            for graphs, kernels in FORMS if dtype == "bfloat16" else FORMS[:1]:
                measure(f"tiny-r1 {dtype}", tiny, count, prompts, graphs=graphs, kernels=kernels)
                if count == 1:
                    measure(f"tiny-r1 {dtype}", tiny, count, prompts, graphs=graphs, kernels=kernels, speculate=4)
    if chosen.only == "tiny":
        return
    model = lite()
    found["lite_parameters"] = sum(parameter.numel() for parameter in model.parameters())
    for count in (1, 64) if chosen.quick else (1, 4, 16, 64, 256):
        for graphs, kernels in FORMS[1:] if chosen.quick else FORMS:
            measure("V2-Lite shape bfloat16", model, count, None, graphs=graphs, kernels=kernels)
    rng = random.Random(0)
    stem = [rng.randrange(400) for _ in range(LONG)]
    for count in (64,) if chosen.quick else (1, 16, 64):
        for kernels, cache_dtype in ((False, "model"), (True, "model"), (True, "fp8")):
            name = f"V2-Lite shape bfloat16, prompt of {LONG}"
            measure(name, model, count, [stem] * count, kernels=kernels, cache_dtype=cache_dtype)
    found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

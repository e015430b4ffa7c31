"""The engine on a GPU: tokens/s against concurrency, by precision of the weights and the cache, with and without MTP.

    python -m tests.bench.engine_gpu --json engine_gpu.json [--quick] [--only tiny|lite] [--until SECONDS]

Two models: tiny-r1, and a model of DeepSeek-V2-Lite's shape (15.7B parameters, 2.7B activated; random weights, with
the output layer scaled up so that its distributions are as peaked as a trained model's), and a draft module of V3's
kind. tiny-r1 gets problems that it knows and stops when it is done, at least 16 a row however few are in flight; the
other model gets 128 random tokens a request, and writes 128. Temperature 0.6, top-p 0.95. In the rows of 3,968 prompt
tokens all requests have the same prompt, computed once: what is told there is decoding over it. What is told is new
tokens a second of the whole call, prefill included, the best of the rounds after one that is not counted, and which
part of a speculating row's requests have the plain row's tokens (bf16 rounds otherwise in another batch shape, and a
draw on a border may turn). A draft module of random weights is hardly ever right: such rows say what drafting costs,
not what it brings. The most telling rows come first, and none is begun after --until seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import teacher.runner
from teacher import load_model
from teacher.config import DeepseekV3Config
from teacher.engine import Engine
from teacher.model import DeepseekV3
from teacher.quantized_experts import quantize_experts
from teacher.quantized_linear import quantize_linears
from teacher.requests import Request
from tests.bench.kernels import about

PROMPT, NEW, LONG = 128, 128, 3968
LEAST = 16  # requests of a row of tiny-r1, whose answers are some 50 tokens


def lite() -> DeepseekV3:
    """DeepSeek-V2-Lite's sizes (its config.json), with V3's gate; weights drawn on the GPU."""
    config = DeepseekV3Config(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None, num_nextn_predict_layers=1,
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


WEIGHTS = {"model": "bfloat16", "experts": "experts in FP8", "fp8": "all in FP8"}


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


def speed(
    model: DeepseekV3,
    count: int,
    rounds: int,
    prompts: list[list[int]] | None,
    fused: bool = True,
    most: int = 1,
    **settings: Any,
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """A row for `count` requests in flight, of `most` or as many in all, and what each request brought."""
    length = max(512, len(prompts[0]) + NEW if prompts else 0)
    obstacle = teacher.runner.fused_obstacle
    teacher.runner.fused_obstacle = obstacle if fused else lambda model: "switched off"
    engine = Engine(model, None, count, length, cache_tokens=count * length, speculate_rows=count, **settings)
    teacher.runner.fused_obstacle = obstacle
    found = []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        asked = requests(max(count, most), 400, NEW, prompts)
        done = {each.id: each.token_ids for each in engine.generate(asked)}
        torch.cuda.synchronize()
        found.append(sum(map(len, done.values())) / (time.perf_counter() - started))
    stats = engine.stats()
    accepted = round(stats.accepted / stats.drafted, 4) if stats.drafted else None
    row = {"tokens_per_second": round(max(found[1:])), "accepted": accepted, "runs_in": engine.runs_in}
    return row, done


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


def tiny_rows(quick: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Concurrency and settings for tiny-r1."""
    for count in (1, 8, 256) if quick else (1, 4, 8, 16, 64, 256):
        yield count, {}
        if count <= 16:
            yield count, {"speculate": 4}
    for count in (1, 256):
        yield count, {"graphs": False}


def lite_rows(weights: str, quick: bool) -> Iterator[tuple[int, bool, dict[str, Any]]]:
    """Concurrency, whether the prompt is long, and settings, for V2-Lite's shape with these weights."""
    for count in (1, 64) if quick or weights == "experts" else (1, 64, 256, 4, 16):
        yield count, False, {}
    if weights == "experts":
        return
    if weights == "fp8":
        for count in (64,) if quick else (64, 1):
            yield count, True, {"cache_dtype": "fp8"}
        for count in (1,) if quick else (1, 8):
            yield count, False, {"speculate": 1}
    for count in (1,) if quick else (1, 64):
        yield count, False, {"fused": False}
    if not quick:
        yield 64, True, {"cache_dtype": "model"}
        yield 1, False, {"graphs": False}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--commit", help="name of the code under test, where git does not know it")
    options.add_argument("--only", choices=("tiny", "lite"))
    options.add_argument("--until", type=float, default=140.0, help="seconds after which no row is begun")
    chosen = options.parse_args()
    started = time.perf_counter()
    found: dict[str, Any] = {"about": about(chosen.commit, "tests.bench.engine_gpu"), "rows": []}
    rounds = 1 if chosen.quick else 2

    plain: dict[tuple[str, int], dict[str, list[int]]] = {}

    def measure(
        name: str, model: DeepseekV3, count: int, prompts: list[list[int]] | None, most: int = 1, **settings: Any
    ) -> None:
        row = {"model": name, "concurrency": count, **settings}
        if time.perf_counter() - started > chosen.until:
            row["left_out"] = f"after {chosen.until:.0f} s"
        else:
            told, tokens = speed(model, count, rounds, prompts, most=most, **settings)
            row |= told
            if not settings:
                plain[name, count] = tokens
            if "speculate" in settings and (expected := plain.get((name, count))):
                row["same"] = round(sum(tokens[each] == expected[each] for each in expected) / len(expected), 4)
        row["at_seconds"] = round(time.perf_counter() - started, 1)
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps(found, indent=1))

    rng = random.Random(0)
    stem = [rng.randrange(400) for _ in range(LONG)]

    def measure_lite(weights: str) -> None:
        model = quantized(lite(), weights)
        for count, long, settings in lite_rows(weights, chosen.quick):
            name = f"V2-Lite shape, {WEIGHTS[weights]}{f', prompt of {LONG}' if long else ''}"
            measure(name, model, count, [stem] * count if long else None, **settings)

    if chosen.only != "tiny":
        measure_lite("fp8")
    if chosen.only != "lite":
        prompts = real_prompts(256)
        tiny = load_model("teacher/models/tiny-r1", dtype="bfloat16", device="cuda")
        for count, settings in tiny_rows(chosen.quick):
            measure("tiny-r1, bfloat16", tiny, count, prompts, LEAST, **settings)
    if chosen.only != "tiny":
        for weights in ("model", "experts"):
            torch.cuda.empty_cache()
            measure_lite(weights)
    found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""DeepSeek-R1's layers at their true size on one GPU: a dense and a mixture-of-experts layer, decode and prefill.

    python -m tests.bench.r1_layer [--quick] [--json r1_layer.json] [--weights fp8|experts] [--cache model|fp8]
    python -m tests.bench.r1_layer --tiny --device cpu          the same at toy sizes, to rehearse

Both layers are teacher's own modules with random weights drawn in FP8 on the GPU, run as the engine runs them:
`TorchRunner`'s views over a paged latent cache, the MLA decoding kernel, a CUDA graph a step. Parts of a layer are
timed by themselves; what is left to the layer's own time are the launches between. Floors: bytes over the measured
copy, FLOP over the measured bf16 product (attention over the cache) or twice that (products in FP8), whichever is more.

What 61 layers on 8 GPUs would do is reckoned from these: attention data-parallel (each GPU its own sequences), 32 of
the 256 experts on each GPU (measured: the pairs that 8 GPUs' tokens bring to them) and the shared one on all, the head
split eight ways at the speed of a copy. The exchange between the GPUs is neither measured nor counted, so this is an
upper bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teacher.cache import LatentCache
from teacher.config import DeepseekV3Config
from teacher.experts import MLP, MoE
from teacher.fp8 import FP8
from teacher.fused import MOST_PAIRED, FusedMLP, Step
from teacher.model import DeepseekV3
from teacher.quantized_experts import QuantizedExperts, quantize_experts
from teacher.quantized_linear import QuantizedLinear, quantize_linears
from teacher.routing import Routing
from teacher.runner import TorchRunner
from tests.bench.kernels_timing import Bench, Ceilings, Row

GPUS, PAGE = 8, 64
CONFIG = Path(__file__).parents[2] / "configs/teacher/deepseek-v3.json"


class CpuBench:
    """Bench's `measure` by the host's clock, for rehearsals."""

    def measure(
        self, kernel: str, shape: str, by: str, flops: float, bytes: float, makes: list[Callable[[], Any]]
    ) -> Row:
        started = time.perf_counter()
        makes[0]()
        seconds = time.perf_counter() - started
        return Row(kernel, shape, by, flops, bytes, seconds, seconds, seconds)


def build(tiny: bool, weights: str, device: str) -> DeepseekV3:
    """One dense layer and one of experts, with weights drawn where they lie."""
    config = DeepseekV3Config.from_json(CONFIG)
    changes: dict[str, Any] = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    changes |= {"quantization_config": None, "vocab_size": 1024, "max_position_embeddings": 32768}
    if tiny:
        changes |= {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128}
        changes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 32, "kv_lora_rank": 64}
        changes |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    model = DeepseekV3.on_meta(dataclasses.replace(config, **changes))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    quantize_experts(model, shared=weights == "fp8")
    if weights == "fp8":
        quantize_linears(model)
    model = model.to_empty(device=device)
    model.fill_rotation_table()
    draw(model)
    return model


@torch.no_grad()
def draw(model: DeepseekV3) -> None:
    """Matrices of normal values of variance 1 / inputs: in FP8 of size 1 with that scale, norms of ones."""
    for name, tensor in model.state_dict().items():
        inputs = tensor.shape[-1]
        if tensor.dtype == FP8:
            for part in tensor.flatten().split(2**28):
                part.copy_(torch.randn(len(part), dtype=torch.bfloat16, device=part.device))
        elif name.endswith("_scale"):
            tensor.fill_((inputs * 128) ** -0.5)
        elif tensor.dim() == 1:
            tensor.fill_(0.0 if "bias" in name else 1.0)
        else:
            tensor.normal_(std=inputs**-0.5)


class Layers:
    """Both layers over a cache with room for what is measured."""

    def __init__(self, model: DeepseekV3, cache_dtype: torch.dtype, most_tokens: int, kernels: bool) -> None:
        self.model, self.config, self.device = model, model.config, model.lm_head.weight.device
        self.dense, self.sparse = model.main_layers
        assert isinstance(self.sparse.mlp, MoE) and isinstance(self.sparse.mlp.experts, QuantizedExperts)
        self.moe, self.experts = self.sparse.mlp, self.sparse.mlp.experts
        self.cache = LatentCache(self.config, 2, most_tokens // PAGE, PAGE, cache_dtype, self.device)
        for layer in self.cache.latents_LPGC:  # zeros would make attention's scores all alike
            if cache_dtype == torch.uint8:
                layer.random_(0, 0x38)  # codes below 1, scales and keys small: as bytes they are all finite
            else:
                layer.normal_()
        self.runner = TorchRunner(model, self.cache, kernels)
        self.shared = shared_alone(self.experts)

    def inputs(self, rows: int, new: int, context: int) -> tuple[Tensor, Tensor, Tensor, Any, bool]:
        """Hidden states of `new` tokens of `rows` sequences that end at `context`, and where their caches lie."""
        x_BTH = torch.randn(rows, new, self.config.hidden_size, dtype=torch.bfloat16, device=self.device)
        position_BT = torch.arange(context - new, context, device=self.device).repeat(rows, 1)
        pages = -(-context // PAGE)
        table_BP = 1 + torch.arange(rows * pages, dtype=torch.int32, device=self.device).view(rows, pages)
        views, absorbed = self.runner._views(slice(0, 2), position_BT, table_BP, None, new == context)
        return x_BTH, self.model.cos_TD[position_BT], self.model.sin_TD[position_BT], views, absorbed

    def floors(self, rows: int, new: int, context: int, visited: float) -> dict[str, tuple[float, float, float]]:
        """(FLOP in FP8, FLOP in bf16, bytes) by part of the layers: weights in FP8 as checkpoints have them, each read
        once; the cache read once; hidden states in and out."""
        config, tokens = self.config, rows * new
        attention = sum(p.numel() for n, p in self.sparse.self_attn.state_dict().items() if n.endswith("proj.weight"))
        attention += self.sparse.self_attn.kv_a_proj_with_mqa.weight.numel()
        heads, hidden = config.num_attention_heads, config.hidden_size
        decode = new <= 8
        pairs = tokens * context if decode else tokens * (context - new / 2)
        head_size = config.latent_dim + config.kv_lora_rank if decode else config.qk_head_dim + config.v_head_dim
        row = self.cache.latents_LPGC.shape[-1] * self.cache.latents_LPGC.element_size()
        expert = 3 * hidden * config.moe_intermediate_size
        dense, gate = 3 * hidden * config.intermediate_size, config.n_routed_experts * hidden
        moved, k = 4 * tokens * hidden, config.num_experts_per_tok
        shared, cached = expert * config.n_shared_experts, rows * context * row
        return {
            "attention": (2 * tokens * attention, 2 * pairs * heads * head_size, attention + cached + moved),
            "norms": (0, 0, 3 * moved),
            "router": (0, 2 * tokens * gate, 2 * gate + moved / 2),
            "experts": (2 * tokens * k * expert, 0, visited * expert + moved),
            "shared": (2 * tokens * shared, 0, shared + moved),
            "dense": (2 * tokens * dense, 0, dense + moved),
        }  # fmt: skip


def floor_seconds(floor: tuple[float, float, float], ceilings: Ceilings) -> float:
    fp8, bf16, moved = floor
    return max(fp8 / ceilings.bf16_flops / 2 + bf16 / ceilings.bf16_flops, moved / ceilings.copy_bytes)


@torch.inference_mode()
def measure(layers: Layers, bench: Any, ceilings: Ceilings, rows: int, new: int, context: int) -> dict[str, Any]:
    """Both layers and their parts, in seconds, beside their floors."""
    x, cos, sin, views, absorbed = layers.inputs(rows, new, context)
    sparse, moe, config = layers.sparse, layers.moe, layers.config
    tokens, shape = rows * new, f"{rows} x {new} at {context}"
    x_NH = x.flatten(0, 1)
    routing = moe.gate(x_NH)
    floors = layers.floors(rows, new, context, len(routing.indices_NK.unique()))
    if moe.shared_experts is None:  # it is one of the stack
        both = zip(floors["experts"], floors["shared"], strict=True)
        floors |= {"experts": tuple(a + b for a, b in both), "shared": (0, 0, 0)}  # type: ignore[dict-item]
    found: dict[str, Any] = {"rows": rows, "new": new, "context": context, "absorbed": absorbed, "us": {}, "note": {}}

    def time_of(name: str, run: Callable[[], Any]) -> None:
        row = bench.measure("r1 layer", shape, name, 0, 0, [run])
        found["us"][name] = round(row.seconds * 1e6, 1) if row.seconds == row.seconds else None
        if row.note:
            found["note"][name] = row.note

    def norms() -> Tensor:
        return sparse.post_attention_layernorm(x + sparse.input_layernorm(x)) + x

    fused = layers.runner._fused if absorbed else None
    if fused is None:
        time_of("moe layer", lambda: sparse.extend(x, cos, sin, views[1], absorbed))
        time_of("dense layer", lambda: layers.dense.extend(x, cos, sin, views[0], absorbed))
        time_of("attention", lambda: sparse.self_attn.extend(x, cos, sin, views[1], absorbed))
        time_of("norms", norms)
        time_of("router", lambda: moe.gate(x_NH))
    else:
        from teacher.kernels.rms_norm import add_rms_norm

        numbers_N = torch.arange(tokens, dtype=torch.int32, device=layers.device)
        step = Step(cos.flatten(0, 1).contiguous(), sin.flatten(0, 1).contiguous(), rows, numbers_N)
        one, weight = fused.layers[1], sparse.input_layernorm.weight
        parts_SNH = torch.randn(1, *x_NH.shape, dtype=torch.bfloat16, device=layers.device)
        in_fp8 = one.joint.fp8 is not None
        normed = add_rms_norm(x_NH, None, weight, 1e-6, in_fp8)
        if rows in (1, 64) and layers.device.type == "cuda":
            plain_NH = (sparse.extend(x, cos, sin, views[1], absorbed) - x).flatten(0, 1).float()
            sum_NH, more_SNH = one.extend(x_NH, None, step, views[1])
            error_NH = sum_NH.float() + more_SNH.float().sum(0) - x_NH.float() - plain_NH
            found["fused_error"] = round(float(error_NH.abs().mean() / plain_NH.abs().mean()), 5)
            time_of("moe layer, not fused", lambda: sparse.extend(x, cos, sin, views[1], absorbed))
        time_of("moe layer", lambda: one.extend(x_NH, parts_SNH, step, views[1]))
        time_of("dense", lambda: fused.layers[0].mlp(normed.in_fp8 or normed.normed_NH))
        time_of("dense layer", lambda: fused.layers[0].extend(x_NH, parts_SNH, step, views[0]))
        time_of("attention", lambda: one._attend(normed.in_fp8 or normed.normed_NH, step, views[1]))
        time_of("norms", lambda: [add_rms_norm(x_NH, parts_SNH, weight, 1e-6, in_fp8) for _ in range(2)])
        time_of("router", lambda: one._route(x_NH))
    if fused is not None and tokens <= MOST_PAIRED and normed.in_fp8 is not None:
        time_of("experts, sorted", lambda: moe.experts(x_NH, routing))
        time_of("experts", lambda: moe.experts.pairs(normed.in_fp8, routing))
    else:
        time_of("experts", lambda: moe.experts(x_NH, routing))
    if fused is not None and normed.in_fp8 is not None:
        time_of("shared alone", lambda: layers.shared(normed.in_fp8))
    else:
        alone = part_of(layers.experts, slice(-1, None))
        token_N1 = torch.zeros(tokens, 1, dtype=torch.int64, device=layers.device)
        weight_N1 = torch.ones(tokens, 1, device=layers.device)
        time_of("shared alone", lambda: alone(x_NH, Routing(token_N1, weight_N1, weight_N1)))
    if moe.shared_experts is not None:
        time_of("shared", lambda: moe.shared_experts(x))
    if fused is None:
        time_of("dense", lambda: layers.dense.mlp(x))
    time_of("experts, one GPU's share of 8", share(layers, tokens))
    found["floor_us"] = {name: round(floor_seconds(each, ceilings) * 1e6, 2) for name, each in floors.items()}
    floor = found["floor_us"]
    floor["moe layer"] = round(sum(floor[part] for part in ("attention", "norms", "router", "experts", "shared")), 1)
    floor["dense layer"] = round(sum(floor[part] for part in ("attention", "norms", "dense")), 1)
    found["visited"] = len(routing.indices_NK.unique())
    found["eight_gpus"] = predict(found, config, ceilings, tokens, new)
    return found


def share(layers: Layers, tokens: int) -> Callable[[], Any]:
    """What one of 8 GPUs does for `tokens` of each: a pair a token of all, uniform over its eighth of the experts."""
    own = layers.config.n_routed_experts // GPUS
    pairs = tokens * layers.config.num_experts_per_tok
    x_NH = torch.randn(pairs, layers.config.hidden_size, dtype=torch.bfloat16, device=layers.device)
    indices_N1 = torch.randint(own, (pairs, 1), device=layers.device)
    weights_N1 = torch.rand(pairs, 1, device=layers.device) + 0.1
    part = part_of(layers.experts, slice(own))
    return lambda: part(x_NH, Routing(indices_N1, weights_N1, weights_N1))


def shared_alone(experts: QuantizedExperts) -> FusedMLP:
    """The last expert as the fused feed-forward that a GPU would run beside its share of the routed ones."""
    hidden, inner = experts.down_proj.shape[1:]
    with torch.device("meta"):
        mlp = MLP(hidden, inner)
    weights = (*experts.gate_up_proj[-1].chunk(2), experts.down_proj[-1])
    scales = (*experts.gate_up_scale[-1].chunk(2), experts.down_scale[-1])
    for name, weight, scale in zip(("gate_proj", "up_proj", "down_proj"), weights, scales, strict=True):
        linear = QuantizedLinear(weight.shape[1], weight.shape[0], None, weight.device)
        linear.weight, linear.weight_scale = weight, scale
        setattr(mlp, name, linear)
    return FusedMLP(mlp)


def part_of(experts: QuantizedExperts, some: slice) -> QuantizedExperts:
    """Some experts of the stack as one of their own, over the same memory."""
    part = QuantizedExperts(0, *experts.down_proj.shape[1:], experts.down_proj.device)
    for name, tensor in experts.named_buffers():
        setattr(part, name, tensor[some])
    return part


def predict(
    found: dict[str, Any], config: DeepseekV3Config, ceilings: Ceilings, tokens: int, new: int
) -> dict[str, Any] | None:
    """A step of 61 layers on 8 GPUs; see the module."""
    us = found["us"]
    if any(us.get(name) is None for name in ("moe layer", "dense layer", "experts")):
        return None
    head = 2 * 129280 * config.hidden_size / GPUS / ceilings.copy_bytes * 1e6
    # The parts by themselves: the layer minus its experts would hold the spread of both.
    moe = sum(us[part] for part in ("attention", "norms", "router", "shared alone", "experts, one GPU's share of 8"))
    step = 3 * us["dense layer"] + 58 * moe + head
    return {
        "moe_layer_us": round(moe, 1),
        "step_ms": round(step / 1e3, 2),
        "tokens_per_second": round(GPUS * tokens / step * 1e6),
        "a_sequence": round(1e6 * new / step, 1) if new == 1 else None,
    }


PARTS = ("attention", "norms", "router", "experts", "shared", "dense")


def line(found: dict[str, Any]) -> str:
    """A row for people: microseconds, with the share of its floor."""

    def cell(name: str) -> str:
        us = found["us"].get(name)
        return f"{'—':>15}" if us is None else f"{us:>9.1f} {found['floor_us'][name] / us:>4.0%}"

    ahead = found["eight_gpus"] or {}
    what = f"{found['rows']:>3} x {found['new']:<5} at {found['context']:<5}"
    said = f" | 8 GPUs: {ahead.get('step_ms')} ms, {ahead.get('tokens_per_second')} tokens/s"
    if "moe layer, not fused" in found["us"]:
        said += f" (not fused: {found['us']['moe layer, not fused']}, apart by {found['fused_error']})"
        said += "".join(f" ({name}: {us})" for name, us in found["us"].items() if "sorted" in name)
    return what + "".join(cell(name) for name in ("moe layer", "dense layer", *PARTS)) + said


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="tests.bench.r1_layer", description=__doc__)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--device", default="cuda")
    options.add_argument("--weights", choices=("fp8", "experts"), default="fp8", help="what is kept in FP8")
    options.add_argument("--cache", choices=("model", "fp8"), default="model")
    options.add_argument("--only", choices=("decode", "prefill"))
    options.add_argument("--json", type=Path)
    options.add_argument("--commit", help="name of the code under test, where git does not know it")
    chosen = options.parse_args(arguments)
    on_gpu = chosen.device == "cuda"
    bench: Any = Bench(True) if on_gpu else CpuBench()
    ceilings = Ceilings.measured(bench) if on_gpu else Ceilings(1e10, 1e11)
    found: dict[str, Any] = {"weights": chosen.weights, "cache": chosen.cache, "decode": [], "prefill": []}
    if on_gpu:
        from tests.bench.kernels import about

        found["about"] = about(chosen.commit, "tests.bench.r1_layer")
    found["ceilings"] = {
        "copy_tb_per_s": round(ceilings.copy_bytes / 1e12, 3), "bf16_tflops": round(ceilings.bf16_flops / 1e12, 1)
    }  # fmt: skip
    print(json.dumps({key: value for key, value in found.items() if value}), flush=True)
    contexts, batches = (1024, 4096), (1, 8, 32, 64, 128, 256)
    prompts = (1024, 4096, 16384)
    if chosen.quick:
        contexts, batches, prompts = (4096,), (1, 8, 64, 256), (4096,)
    if chosen.tiny:
        contexts, batches, prompts = (128,), (1, 3), (64,)
    cache_dtype = torch.uint8 if chosen.cache == "fp8" else torch.bfloat16
    most = max([contexts[-1] * batches[-1], *prompts])
    layers = Layers(build(chosen.tiny, chosen.weights, chosen.device), cache_dtype, most, on_gpu)
    print(f"{'':>19}" + "".join(f"{name:>15}" for name in ("moe layer", "dense layer", *PARTS)), flush=True)
    # The most telling first: a run that is cut short loses the least.
    decode = [("decode", b, 1, c) for c in reversed(contexts) for b in batches]
    work = decode[: len(batches)] + [("prefill", 1, t, t) for t in prompts] + decode[len(batches) :]
    for kind, rows, new, context in work:
        if chosen.only in (None, kind):
            found[kind].append(measure(layers, bench, ceilings, rows, new, context))
            print(line(found[kind][-1]), found[kind][-1]["note"] or "", flush=True)
            if chosen.json:
                chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

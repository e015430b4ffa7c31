"""The roofline: tokens/s if a decode step were its matrix products and nothing else.

    python -m tests.bench.engine_roofline teacher/models/tiny-r1 [batch] [context] [prompt]

For every product of the decode step at this batch (shapes from the config; see `products`), alone in a loop, the time
of the fastest way that torch has: mm and addmm into an output that is there already, with the weight in either layout,
linear with a prepacked oneDNN weight, bmm, grouped_mm, a loop of mm, and for attention the flash kernel too, softmax
and all. Operands are warm and never change; the shortest of many timings counts; norms, activations, rotation, softmax,
routing, sorting for the experts, the cache's pages, sampling, Python and the prompts are all left out. Products that
can be one are one (the two projections of the input, gate and up, all experts that share a shape). So:

    seconds a token = sum over products of (copies in the model x shortest seconds) / batch
    tokens/s        = 1 / seconds a token, for one thread, for two threads on each product, and for two processes with
                      half of the batch each; the best of the three is the roofline

These rates hold what a call into torch costs, as "the rate at these shapes" must, but an engine with kernels of its own
could do without it. So a second line, `calls_free`, lets a product also run with 16 times the rows, its time divided by
16, if that is faster: what the cores reach at these widths when calls cost nothing. An engine is told against both,
and, as prompts must be run too, against `with_prompts`: the first line with the prompt's own products added.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SECONDS_A_TIMING, TIMINGS = 0.002, 5
LARGE = 16


class Product(NamedTuple):
    """`groups` independent products (rows, inner) @ (inner, columns), `copies` times in the model."""

    name: str
    copies: int
    groups: int
    rows: int
    inner: int
    columns: int
    kind: str = "dense"  # dense | experts | attention: cached entries as keys, then as values

    @property
    def flops(self) -> int:
        return 2 * self.copies * self.groups * self.rows * self.inner * self.columns


def products(config: dict[str, Any], batch: int, context: int) -> list[Product]:
    """Every product of a decode step of `batch` sequences, each with `context` cached tokens; MLA in absorbed form."""
    c, heads = config, config["num_attention_heads"]
    hidden, layers, rank = c["hidden_size"], c["num_hidden_layers"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    query, latent = heads * (nope + rope), rank + rope
    found = [Product("attention scores", layers, batch, heads, latent, context, "attention")]
    found += [Product("attention values", layers, batch, heads, context, rank, "attention")]
    found += [Product("absorbed keys", layers, heads, batch, nope, rank)]
    found += [Product("absorbed values", layers, heads, batch, rank, value)]
    return found + _per_token(c, batch, layers, query, latent, hidden, heads * value)


def prompt_products(config: dict[str, Any], sequences: int, length: int) -> list[Product]:
    """The same for `sequences` whole prompts of `length` tokens: keys and values rebuilt, attention among themselves,
    half of it causal. The head's product is that of the first drawn token and counted with decoding."""
    c, heads = config, config["num_attention_heads"]
    layers, rank, value = c["num_hidden_layers"], c["kv_lora_rank"], c["v_head_dim"]
    key = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    half = max(1, length // 2)
    found = [Product("prompt scores", layers, sequences * heads, length, key, half)]
    found += [Product("prompt values", layers, sequences * heads, length, half, value)]
    rebuilt = heads * (c["qk_nope_head_dim"] + value)
    found += [Product("prompt keys and values", layers, 1, sequences * length, rank, rebuilt)]
    latent = rank + c["qk_rope_head_dim"]
    rest = _per_token(c, sequences * length, layers, heads * key, latent, c["hidden_size"], heads * value)
    return found + [product for product in rest if product.name != "head"]


def _per_token(
    c: dict[str, Any], rows: int, layers: int, query: int, latent: int, hidden: int, attended: int
) -> list[Product]:
    """Projections, MLPs and experts of `rows` tokens."""
    found = []
    if c.get("q_lora_rank"):
        found += [Product("query and latent down", layers, 1, rows, hidden, c["q_lora_rank"] + latent)]
        found += [Product("query up", layers, 1, rows, c["q_lora_rank"], query)]
    else:
        found += [Product("query and latent", layers, 1, rows, hidden, query + latent)]
    found += [Product("attention output", layers, 1, rows, attended, hidden)]
    dense = min(c["first_k_dense_replace"], layers)
    sparse, experts, width = layers - dense, c["n_routed_experts"], c["moe_intermediate_size"]
    if dense:
        found += [Product("MLP gate and up", dense, 1, rows, hidden, 2 * c["intermediate_size"])]
        found += [Product("MLP down", dense, 1, rows, c["intermediate_size"], hidden)]
    if sparse:
        pairs = rows * c["num_experts_per_tok"]
        used = max(1, round(experts * (1 - (1 - c["num_experts_per_tok"] / experts) ** rows)))
        each = max(1, round(pairs / used))
        found += [Product("router", sparse, 1, rows, hidden, experts)]
        found += [Product("experts gate and up", sparse, used, each, hidden, 2 * width, "experts")]
        found += [Product("experts down", sparse, used, each, width, hidden, "experts")]
        if shared := c.get("n_shared_experts"):
            found += [Product("shared expert gate and up", sparse, 1, rows, hidden, 2 * width * shared)]
            found += [Product("shared expert down", sparse, 1, rows, width * shared, hidden)]
    return [*found, Product("head", 1, 1, rows, hidden, c["vocab_size"])]


def ways(product: Product, dtype: Any) -> dict[str, Callable[[], Any]]:
    """How torch can do this product."""
    import torch
    import torch.nn.functional as F

    groups, rows, inner, columns = product.groups, product.rows, product.inner, product.columns
    x, w = torch.randn(groups, rows, inner, dtype=dtype), torch.randn(groups, inner, columns, dtype=dtype)
    transposed = w.transpose(1, 2).contiguous()
    out = torch.empty(groups, rows, columns, dtype=dtype)
    found: dict[str, Callable[[], Any]] = {
        "bmm": lambda: torch.bmm(x, w, out=out),
        "bmm, weight transposed": lambda: torch.bmm(x, transposed.transpose(1, 2), out=out),
    }
    if groups == 1:
        x0, w0, t0, out0 = x[0], w[0], transposed[0], out[0]
        found |= {
            "mm": lambda: torch.mm(x0, w0, out=out0),
            "mm, weight transposed": lambda: torch.mm(x0, t0.t(), out=out0),
            "addmm": lambda: torch.addmm(out0, x0, w0, beta=0, out=out0),
            "linear": lambda: F.linear(x0, t0),
        }
        if torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(t0, rows)
            found["linear, packed"] = lambda: torch.ops.mkldnn._linear_pointwise(x0, packed, None, "none", [], "")
    if product.kind == "experts":
        flat, ends = x.flatten(0, 1), torch.arange(1, groups + 1, dtype=torch.int32) * rows

        def loop() -> None:
            for i in range(groups):
                torch.mm(x[i], w[i], out=out[i])

        found |= {
            "grouped_mm": lambda: F.grouped_mm(flat, w, offs=ends),
            "grouped_mm, weight transposed": lambda: F.grouped_mm(flat, transposed.transpose(1, 2), offs=ends),
            "loop of mm": loop,
        }
    return found


def flash(scores: Product, dtype: Any) -> Callable[[], Any]:
    """Scores, softmax and values in one kernel; the entry is key and value."""
    import torch
    import torch.nn.functional as F

    q = torch.randn(scores.groups, 1, scores.rows, scores.inner, dtype=dtype)
    kv = torch.randn(scores.groups, 1, scores.columns, scores.inner, dtype=dtype)
    return lambda: F.scaled_dot_product_attention(q, kv, kv)


def shortest(work: Callable[[], Any], meet: Callable[[], Any]) -> float:
    """Seconds of one call: the best of some timings of many calls each, begun together with the other processes."""
    work()
    start = time.perf_counter()
    work()
    calls = max(1, int(SECONDS_A_TIMING / max(time.perf_counter() - start, 1e-7)))
    meet()
    best, begun = float("inf"), time.perf_counter()
    for _ in range(TIMINGS):
        start = time.perf_counter()
        if start - begun > 20 * SECONDS_A_TIMING * TIMINGS:  # another process is in the way
            break
        for _ in range(calls):
            work()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def times(wanted: list[Product], dtype_name: str, meet: Callable[[], Any]) -> dict[str, tuple[float, str]]:
    """Shortest seconds and the way, by product; the two of attention are one entry if the flash kernel is faster."""
    import torch

    dtype = getattr(torch, dtype_name)
    found: dict[str, tuple[float, str]] = {}
    with torch.inference_mode():
        for product in wanted:
            tried = {way: shortest(work, meet) for way, work in ways(product, dtype).items()}
            way = min(tried, key=lambda name: tried[name])
            found[product.name] = (tried[way], way)
        scores = next((p for p in wanted if p.name == "attention scores"), None)
        if scores is not None:
            seconds = shortest(flash(scores, dtype), meet)
            if seconds < found["attention scores"][0] + found["attention values"][0]:
                found["attention scores"] = (seconds, "flash, softmax and values included")
                found["attention values"] = (0.0, "in the scores' kernel")
    return found


def _child(
    config: dict[str, Any], batch: int, context: int, prompt: int, dtype: str, threads: int, barrier: Any, queue: Any
) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = products(config, batch, context)
    # Attention's groups are sequences: more of them would only leave the caches.
    large = [p for p in products(config, batch * LARGE, context) if p.kind != "attention"]
    sequences = max(1, 2048 // prompt)
    before = prompt_products(config, sequences, prompt)
    got = [times(wanted, dtype, barrier.wait) for wanted in (step, large, before)]
    free = dict(got[0])
    for name, (seconds, way) in got[1].items():
        free[name] = min(free[name], (seconds / LARGE, way))
    square = torch.randn(1024, 1024, dtype=getattr(torch, dtype))
    peak = 2 * 1024**3 / shortest(lambda: torch.mm(square, square), barrier.wait)

    def total(wanted: list[Product], found: dict[str, tuple[float, str]], tokens: int) -> float:
        return sum(p.copies * found[p.name][0] for p in wanted) / tokens

    queue.put(
        {
            "step": total(step, got[0], batch), "calls_free": total(step, free, batch),
            "prompt": total(before, got[2], sequences * prompt), "peak": peak,
            "products": [
                p._asdict() | {
                    "microseconds": got[0][p.name][0] * 1e6, "way": got[0][p.name][1],
                    "gflops": p.flops / p.copies / max(got[0][p.name][0], 1e-12) / 1e9,
                } for p in step
            ],
        }
    )  # fmt: skip


def measure(config: dict[str, Any], batch: int, context: int, prompt: int, new: int, dtype: str) -> dict[str, Any]:
    """Tokens/s of the three layouts; `prompt` and `new`: tokens of the mean request."""
    spawn = multiprocessing.get_context("spawn")
    layouts = {}
    for name, processes, threads in (("one thread", 1, 1), ("two threads", 1, 2), ("two processes", 2, 1)):
        barrier, queue = spawn.Barrier(processes), spawn.Queue()
        settings = (config, batch // processes, context, prompt, dtype, threads, barrier, queue)
        children = [spawn.Process(target=_child, args=settings) for _ in range(processes)]
        for child in children:
            child.start()
        found = [queue.get(timeout=300) for _ in children]
        for child in children:
            child.join()
        layouts[name] = {
            "tokens_per_second": sum(1 / f["step"] for f in found),
            "calls_free": sum(1 / f["calls_free"] for f in found),
            "with_prompts": sum(1 / (f["step"] + f["prompt"] * prompt / new) for f in found),
            "peak_gflops": sum(f["peak"] for f in found) / 1e9,
            "products": found[0]["products"],
        }
    flops = sum(p.flops for p in products(config, batch, context)) / batch
    top = {
        key: max(layout[key] for layout in layouts.values())
        for key in ("tokens_per_second", "calls_free", "with_prompts")
    }
    return top | {
        "dtype": dtype, "batch": batch, "context": context, "flops_per_token": flops,
        "gflops": top["tokens_per_second"] * flops / 1e9, "layouts": layouts,
    }  # fmt: skip


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    batch, context, prompt = [*map(int, numbers), *(256, 96, 32)[len(numbers) :]]
    config = json.loads((Path(folder) / "config.json").read_text())
    for dtype in ("float32", "bfloat16"):
        found = measure(config, batch, context, prompt, 128, dtype)
        for name, layout in found["layouts"].items():
            print(f"{dtype}, {name}: {layout['tokens_per_second']:,.0f} tokens/s")
            print(f"  {layout['calls_free']:,.0f} if calls were free, {layout['with_prompts']:,.0f} with the prompts")
            print(f"  1024 cubed: {layout['peak_gflops']:,.0f} GFLOP/s")
            for p in layout["products"]:
                shape = f"{p['groups']} x ({p['rows']}, {p['inner']}) @ ({p['inner']}, {p['columns']})"
                rate = f"{p['microseconds']:8.1f} us {p['gflops']:7.0f} GFLOP/s"
                print(f"  {p['copies']:2} {p['name']:26} {shape:36} {rate}  {p['way']}")

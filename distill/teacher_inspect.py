"""`distill teacher inspect`: a DeepSeek-V3 config or checkpoint in numbers, without loading it.

The numbers are teacher.inspect's, teacher.capacity's and teacher.headers'; this file finds what is meant and prints it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.shipped import SHIPPED_MODELS, configs_folder, resolve_model
from distill.visible import visible
from teacher import capacity, headers, inspect
from teacher.config import DeepseekV3Config

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ON_DISK: tuple[inspect.Part, ...] = ("main", "mtp", "copies")


@dataclass(frozen=True)
class Inspection:
    """All that is printed. Sizes in bytes."""

    source: str
    config: DeepseekV3Config
    stored: headers.Stored | None
    cache_tokens: int
    flops: list[inspect.Flops]
    fits: list[capacity.Fit]


def run(name: str, cache_tokens: int, *, as_json: bool = False, console: "Console | None" = None) -> None:
    """Print what `name` is: a config.json, a model folder or a shipped name.

    Raises UserError if it is none of these, ValueError naming what is wrong with the config or a file of weights.
    """
    found = examine(name, cache_tokens)
    if as_json:
        print(json.dumps(as_dict(found), indent=2))
        return
    if console is None:
        from rich.console import Console

        console = Console(highlight=False)
    _print(found, console)


def examine(name: str, cache_tokens: int) -> Inspection:
    """Read the config, and the headers of the weights beside it if there are any."""
    path = locate(name)
    config = DeepseekV3Config.from_json(path)
    try:
        inspect.scale_block(config)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    stored = headers.read_headers(path) if path.is_dir() else None
    work = [inspect.flops(config, context) for context in contexts(config)]
    rooms = [fit for precision in ("bf16", "fp8") for fit in capacity.fits(config, precision, cache_tokens)]
    return Inspection(str(path), config, stored, cache_tokens, work, rooms)


def locate(name: str) -> Path:
    """A path as given, or a shipped model's folder or config. Raises UserError."""
    path = Path(resolve_model(name))
    if path.is_file() and path.suffix != ".json":
        raise UserError(f"{name}: expected a config.json or a model folder, found a {path.suffix or 'nameless'} file")
    if path.exists():
        return path
    shipped = {path.stem: path for path in (configs_folder() / "teacher").glob("*.json")}
    bare = name.removeprefix("teacher/").removesuffix(".json")
    if bare in shipped:
        return shipped[bare]
    names = [*shipped, *(model for model, (package, _) in SHIPPED_MODELS.items() if package == "teacher")]
    raise UserError(f"{name}: no such config.json or model folder; shipped are {', '.join(sorted(names))}")


def contexts(config: DeepseekV3Config) -> list[int]:
    """Three context lengths: the largest power of two that the model has, a quarter of it, and a 32nd."""
    largest = 1 << (config.max_position_embeddings.bit_length() - 1)
    return sorted({max(largest // 32, 1), max(largest // 4, 1), largest})


def as_dict(found: Inspection) -> dict[str, Any]:
    """Everything, exact, for `--json`."""
    config, modules = found.config, found.config.num_nextn_predict_layers
    main, mtp = inspect.count(config), inspect.count(config, "mtp")
    return {
        "source": found.source,
        "parameters": {
            "total": main.total,
            "activated": main.activated,
            "activated_with_embedding": main.activated - config.hidden_size + config.vocab_size * config.hidden_size,
            "by_kind": {
                row.kind: {"total": row.total, "activated": row.activated} for row in inspect.count_by_kind(config)
            },
            "mtp": {"modules": modules, "total": mtp.total, "activated": mtp.activated},
            "on_disk": inspect.count(config, *ON_DISK).total,
        },
        "weight_bytes": {
            precision: {
                "main": inspect.weight_bytes(config, precision),
                "main_and_mtp": inspect.weight_bytes(config, precision, "main", "mtp"),
                "on_disk": inspect.weight_bytes(config, precision, *ON_DISK),
            }
            for precision in inspect.PRECISIONS
        },
        "stored": asdict(found.stored) if found.stored else None,
        "kv_cache": [asdict(form) for form in inspect.cache_forms(config)],
        "flops_per_token": [asdict(row) for row in found.flops],
        "gpus": {
            "cache_tokens": found.cache_tokens,
            "usable": capacity.USABLE,
            "fits": [asdict(f) for f in found.fits],
        },
    }


def _print(found: Inspection, console: "Console") -> None:
    from rich.markup import escape

    config = found.config
    main = inspect.count(config)
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    shared = f" + {config.n_shared_experts} shared" if config.n_shared_experts else ""
    console.print(f"[bold]{escape(visible(found.source))}[/bold]", soft_wrap=True)
    mtp = inspect.count(config, "mtp").total
    console.print(
        f"[bold]{number(main.total)} parameters, {number(main.activated)} activated a token[/bold]"
        + (f"; MTP apart, {number(mtp)}" if mtp else "")
    )
    console.print(
        f"{_many(config.num_hidden_layers, 'layer')} ({dense} dense), hidden {config.hidden_size:,},"
        f" {_many(config.num_attention_heads, 'head')},"
        f" {config.num_experts_per_tok} of {config.n_routed_experts} experts{shared},"
        f" context {config.max_position_embeddings:,}"
    )
    for table, note in (
        _parameters(config),
        _weights(config),
        *([_files(found.stored, config)] if found.stored else []),
        _cache(config),
        _work(found.flops),
        _gpus(found),
    ):
        console.print()
        console.print(table)
        console.print(note, style="dim")


def _parameters(config: DeepseekV3Config) -> "tuple[Table, str]":
    table = _table("parameters", "total", "share", "activated", "share")
    main, modules = inspect.count(config), config.num_nextn_predict_layers
    for row in inspect.count_by_kind(config):
        _row(table, row.kind, row.total, row.activated, main)
    _row(table, "[bold]main model[/bold]", main.total, main.activated, main)
    note = "A token meets one row of the embedding"
    with_table = main.activated + (config.vocab_size - 1) * config.hidden_size
    note += f"; counting the whole table, {number(with_table)} are activated."
    if modules:
        mtp, disk = inspect.count(config, "mtp"), inspect.count(config, *ON_DISK)
        table.add_section()
        table.add_row(f"MTP, {_many(modules, 'module')}", number(mtp.total), "", number(mtp.activated), "")
        note += (
            f" The MTP {'modules use' if modules > 1 else 'module uses'} the main model's embedding and head;"
            f" files repeat them: {number(disk.total)} on disk."
        )
    return table, note


def _row(table: "Table", kind: str, total: int, activated: int, main: inspect.Count) -> None:
    shares = [f"{100 * part / whole:.1f}%" for part, whole in ((total, main.total), (activated, main.activated))]
    table.add_row(kind, number(total), shares[0], number(activated), shares[1])


def _weights(config: DeepseekV3Config) -> "tuple[Table, str]":
    columns: dict[str, tuple[inspect.Part, ...]] = {"main model": ("main",)}
    if config.num_nextn_predict_layers:
        columns |= {"with MTP": ("main", "mtp"), "on disk": ON_DISK}
    table = _table("weights", *columns)
    rows, per_scale = inspect.scale_block(config)
    labels = {"fp32": "fp32", "bf16": "bf16", "fp8": f"FP8, {rows}×{per_scale} scales"}
    for precision in inspect.PRECISIONS:
        sizes = [size(inspect.weight_bytes(config, precision, *parts)) for parts in columns.values()]
        table.add_row(labels[precision], *sizes)
    return table, (
        "1 GiB = 2^30 bytes. FP8 as DeepSeek stores it: the layers' matrices, with fp32 scales; embedding, head,"
        " router, norms and eh_proj in bf16."
    )


def _files(stored: headers.Stored, config: DeepseekV3Config) -> "tuple[Table, str]":
    table = _table(f"in {_many(stored.files, 'file')}", "tensors", "values", "bytes")
    for dtype in sorted(stored.bytes, key=stored.bytes.__getitem__, reverse=True):
        table.add_row(
            visible(dtype), f"{stored.tensors[dtype]:,}", number(stored.values[dtype]), size(stored.bytes[dtype])
        )
    table.add_row(
        "[bold]all[/bold]",
        f"{sum(stored.tensors.values()):,}",
        number(sum(stored.values.values())),
        size(sum(stored.bytes.values())),
    )
    return table, f"By the safetensors headers. {agreement(stored, config)}"


def agreement(stored: headers.Stored, config: DeepseekV3Config) -> str:
    """Whether the files hold as many parameters as the config asks for."""
    if stored.missing:
        return f"{_many(len(stored.missing), 'file')} of the index not here, the first is {visible(stored.missing[0])}."
    expected: dict[str, tuple[inspect.Part, ...]] = {
        "the main model and its MTP modules with their copies": ON_DISK,
        "the main model and its MTP modules without copies": ("main", "mtp"),
        "the main model without MTP": ("main",),
    }
    if not config.num_nextn_predict_layers:
        expected = {"the model": ("main",)}
    counts = {what: inspect.count(config, *parts).total for what, parts in expected.items()}
    for what, total in counts.items():
        if total == stored.parameters:
            return f"{stored.parameters:,} parameters, as the config asks for: {what}."
    wanted = next(iter(counts.values()))
    return f"They hold {stored.parameters:,} parameters; the config asks for {wanted:,}."


def _cache(config: DeepseekV3Config) -> "tuple[Table, str]":
    context = config.max_position_embeddings
    table = _table("KV cache, bf16", "values a layer", "bytes a token", f"{context:,} tokens", "against MLA")
    forms = inspect.cache_forms(config)
    for form in forms:
        table.add_row(
            form.name,
            f"{form.values:,}",
            f"{form.bytes_per_token:,}",
            size(form.bytes_per_token * context),
            f"{form.values / forms[0].values:.1f}×",
        )
    note = "Expanded: this model's keys and values of every head. MHA, GQA, MQA: attention without latents, as large."
    if config.num_nextn_predict_layers:
        extra = 2 * config.latent_dim * config.num_nextn_predict_layers
        note += f" Drafting with MTP adds {extra:,} bytes a token."
    return table, note


def _work(rows: list[inspect.Flops]) -> "tuple[Table, str]":
    table = _table("FLOPs a token", "decode, absorbed", "decode, expanded", "prefill, mean", "training")
    for row in rows:
        decode = (row.matrices + row.attention_absorbed, row.matrices + row.attention_expanded)
        table.add_row(f"context {row.context:,}", *map(operations, (*decode, row.prefill, row.training)))
    return table, (
        f"Matrices take {operations(rows[0].matrices)} of each (2 × activated), attention the rest. Decode: a token at"
        " the end of the context, absorbed over cached latents or expanded over cached keys and values. Prefill: mean"
        " over a causal, expanded prompt. Training: 3 × prefill, without MTP."
    )


def _gpus(found: Inspection) -> "tuple[Table, str]":
    table = _table("GPU", "", "bf16", "weights", "cache", "FP8", "weights", "cache")
    table.columns[1].justify = "left"
    for giga, cards in capacity.SIZES.items():
        cells = []
        for fit in found.fits:
            if fit.size_gb == giga:
                cells += _fit_cells(fit)
        table.add_row(f"{giga} GB", cards, *cells)
    return table, (
        f"Fewest GPUs for the main model and {found.cache_tokens:,} tokens of bf16 cache (--cache-tokens), the weights"
        f" on each, the tokens that fit. {100 * capacity.USABLE:.0f}% of the memory is used. Heads, experts and"
        " vocabulary are divided by a power of two; the latent cache is on every GPU. a×b: b pipeline stages of a GPUs."
    )


def _fit_cells(fit: capacity.Fit) -> list[str]:
    if fit.gpus is None:
        return ["none", "", ""]
    gpus = f"{fit.tensor_parallel}×{fit.pipeline_stages}" if fit.pipeline_stages > 1 else str(fit.gpus)
    return [f"[bold]{gpus}[/bold]", size(fit.weight_bytes_each), number(fit.cache_tokens)]


def _table(first: str, *others: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold cyan")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def number(value: int) -> str:
    """A count: 671.0B, 36.63B, 426.5K; up to 9,999 in full."""
    return f"{value:,}" if value < 10_000 else _scaled(value, "KMBT")


def operations(value: int) -> str:
    """FLOPs: 250.5G."""
    return f"{value:,}" if value < 10_000 else _scaled(value, "KMGT")


def _scaled(value: int, units: str) -> str:
    """Four digits and the unit of a power of 1,000."""
    power = min(len(units), (len(str(value)) - 1) // 3)
    scaled = value / 1000**power
    return f"{scaled:,.{2 if scaled < 100 else 1}f}{units[power - 1]}"


def size(count: int) -> str:
    """Binary units, GiB the largest: 641.3 GiB, 980.0 KiB."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count:,} B"

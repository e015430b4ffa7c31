"""The commands. Nothing heavy is imported before a command runs: `distill --help` must come at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from distill.recipe import Recipe

app = typer.Typer(
    help="Distil the reasoning of an R1-style teacher into small dense students, and measure the gain.",
    epilog="Exit codes: 0 done, 2 a mistake in the input, 1 another failure. DISTILL_DEBUG=1 shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich for --help costs more than the help is prettier
)
teacher_app = typer.Typer(help="Build, inspect and serve the R1-style teacher.", no_args_is_help=True)
base_app = typer.Typer(help="Build the students' base models.", no_args_is_help=True)
app.add_typer(teacher_app, name="teacher")
app.add_typer(base_app, name="base")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, a shipped recipe's name or a run folder.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a recipe whose run is meant.")]
ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A training configuration, a file or a shipped name.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as in students.0.epochs=2.")
]
RunsDir = Annotated[Path, typer.Option(help="Folder that holds the run folders.")]


@app.command("run")
def run_recipe(recipe: RecipeArgument, overrides: Overrides = None, runs_dir: RunsDir = Path("runs")) -> None:
    """Run all stages, resuming what is done."""
    from distill.pipeline import run_all
    from distill.summary import print_summary

    loaded, folder = _recipe_and_folder(recipe, overrides, runs_dir)
    run_all(loaded, folder)
    if loaded.students:
        print_summary(folder)


@app.command()
def traces(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only the I-th of N parts, in a run folder of its own.")
    ] = None,
) -> None:
    """Sample the teacher's traces.

    `distill traces merge OUT RUN...` puts the traces of run folders, of shards above all, into one.
    """
    if recipe == "merge":
        return _merge(overrides or [])
    from distill.generation.merge import parse_shard, shard_folder
    from distill.pipeline import run_stages

    loaded, folder = _recipe_and_folder(recipe, overrides, runs_dir)
    part = None if shard is None else parse_shard(shard)
    if part is not None and not Path(recipe).is_dir():
        folder = shard_folder(folder, part)
    run_stages(["problems", "traces"], loaded, folder, shard=part)


@app.command("filter")
def filter_traces(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    explain: Annotated[
        str | None, typer.Option(metavar="TRACE_ID", help="Only tell why this trace was accepted or rejected.")
    ] = None,
) -> None:
    """Judge the traces, the recipe's or a teacher's, and write the dataset."""
    loaded, folder = _recipe_and_folder(recipe, overrides, runs_dir)
    if explain is None:
        from distill.pipeline import run_stages

        return run_stages(["problems", "traces", "filter"] if loaded.traces else ["filter"], loaded, folder)
    from distill.explain import explain as explained

    _must_exist(folder)
    for line in explained(loaded, folder, explain):
        typer.echo(line)


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None, runs_dir: RunsDir = Path("runs")) -> None:
    """Fine-tune students and baselines."""
    _stages(["train"], recipe, overrides, runs_dir)


@app.command("eval")
def evaluate(recipe: RecipeArgument, overrides: Overrides = None, runs_dir: RunsDir = Path("runs")) -> None:
    """Measure students, baselines and teacher."""
    _stages(["eval"], recipe, overrides, runs_dir)


@app.command()
def report(run: RunArgument, overrides: Overrides = None, runs_dir: RunsDir = Path("runs")) -> None:
    """Write the results and the page again."""
    from distill.pipeline import run_stages
    from distill.summary import print_summary

    recipe, folder = _recipe_and_folder(run, overrides, runs_dir)
    _must_exist(folder)
    run_stages(["report"], recipe, folder, force=True)
    print_summary(folder)


@app.command("show")
def show_traces(
    run: RunArgument,
    runs_dir: RunsDir = Path("runs"),
    status: Annotated[str, typer.Option(help="all, accepted or rejected.")] = "all",
    family: Annotated[str | None, typer.Option(help="Only this family of problems.")] = None,
    failed: Annotated[str | None, typer.Option(help="Only traces that failed this filter.")] = None,
    problem: Annotated[str | None, typer.Option(help="Only this problem, by the beginning of its id.")] = None,
    trace: Annotated[str | None, typer.Option(help="Only this trace, by the beginning of its id.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many traces.")] = None,
) -> None:
    """Page through traces and their verdicts."""
    _, folder = _recipe_and_folder(run, None, runs_dir)
    _must_exist(folder)
    from distill import show

    show.run(folder, status=status, family=family, failed=failed, problem=problem, trace=trace, limit=limit)


@app.command("recipe")
def print_recipe(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print the resolved recipe."""
    from distill.recipe_load import dump_recipe, load_recipe

    typer.echo(dump_recipe(load_recipe(recipe, overrides or [])), nl=False)


@app.command("doctor")
def examine() -> None:
    """Tell what this machine can run."""
    from distill import doctor

    doctor.run()


@teacher_app.command("train")
def train_teacher(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Train a teacher from a seed."""
    path = _config(config)
    from distill import teacher_training

    teacher_training.run(path, overrides or [])


@teacher_app.command("inspect")
def inspect_teacher(
    model: Annotated[
        str, typer.Argument(metavar="CONFIG_OR_CHECKPOINT", help="A config.json, a model folder or a shipped name.")
    ],
    cache_tokens: Annotated[int, typer.Option(min=1, help="Tokens of cache that the GPUs shall hold.")] = 131072,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers, exact, as JSON.")] = False,
) -> None:
    """Count parameters, bytes, FLOPs and GPUs; loads nothing."""
    from distill import teacher_inspect

    teacher_inspect.run(model, cache_tokens, as_json=as_json)


@teacher_app.command("serve")
def serve_teacher(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RECIPE", help="A model folder, a shipped or hub name, or a recipe.")
    ],
    overrides: Overrides = None,
    engine: Annotated[
        Literal["auto", "own", "vllm"], typer.Option(help="auto: ours for what it is made for, else vLLM.")
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name that clients use, several if given again; else the folder's.")
    ] = None,
    reasoning_parser: Annotated[
        Literal["deepseek_r1", "none"],
        typer.Option(help="Split replies at </think> into reasoning and content."),
    ] = "deepseek_r1",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most sequences running at once; else the recipe's, or 256.")
    ] = None,
    max_len: Annotated[int | None, typer.Option(min=2, help="Most tokens a sequence; else the context.")] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(min=2, help="Our engine: room of the latent cache; else by memory.")
    ] = None,
    speculate: Annotated[int | None, typer.Option(min=0, help="Tokens that the MTP head drafts a step.")] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Our engine: sequences waiting before calls get 429.")] = 1024,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the weights; else what is fastest.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Our engine: cpu or cuda; else the recipe's, or cpu.")] = None,
    experts: Annotated[
        Literal["fp8"] | None, typer.Option(help="Our engine: routed experts in FP8, on a Hopper GPU.")
    ] = None,
    weights: Annotated[
        Literal["fp8"] | None, typer.Option(help="Our engine: all that FP8 checkpoints hold so, on a Hopper GPU.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that calls in flight have after SIGTERM.")] = 30,
    only_print: Annotated[bool, typer.Option("--print", help="vLLM: only print its command.")] = False,
    script: Annotated[
        Literal["slurm", "ssh"] | None, typer.Option(help="vLLM: print a launch script for one or more nodes.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="vLLM: nodes of the script.")] = 1,
    gpus: Annotated[int | None, typer.Option(min=1, help="vLLM: GPUs of a node; else this machine's.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="vLLM: GB of each, as on its label.")] = None,
    restarts: Annotated[int, typer.Option(min=0, help="vLLM: restarts in a row before giving up.")] = 10,
    vllm_python: Annotated[str | None, typer.Option(help="Python of the environment that has vLLM.")] = None,
) -> None:
    """Serve OpenAI's endpoints, on our engine or through vLLM; clients must send DISTILL_API_KEY's key, if set."""
    from distill import teacher_serve
    from distill.serving.serve import VllmOptions
    from distill.serving.supervise import Patience

    options = teacher_serve.ServeOptions(
        host=host, port=port, names=tuple(served_model_name or ()), reasoning_parser=reasoning_parser,
        batch_size=batch_size, max_len=max_len, cache_tokens=cache_tokens, speculate=speculate,
        max_waiting=max_waiting, dtype=dtype, device=device, experts=experts, weights=weights, grace=grace,
    )  # fmt: skip
    vllm = VllmOptions(
        python=vllm_python, gpus=gpus, gpu_memory=gpu_memory, nodes=nodes,
        output="print" if only_print else script or "run", patience=Patience(grace=grace, restarts=restarts),
    )  # fmt: skip
    teacher_serve.run(model, overrides or [], options, vllm, engine)


@teacher_app.command("bench")
def bench_teacher(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes: 2 minutes instead of 8.")] = False,
    json: Annotated[Path | None, typer.Option(help="All figures, exact, to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Roofline to this file (.svg, .png).")] = None,
) -> None:
    """Check and time the kernels on a Hopper GPU; from a checkout of the source."""
    from distill import teacher_bench

    raise typer.Exit(teacher_bench.run(quick, json, plot))


@base_app.command("train")
def train_base(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Pretrain a student's base from a seed."""
    path = _config(config)
    from distill import base_training

    base_training.run(path, overrides or [])


def _merge(folders: list[str]) -> None:
    from distill.errors import UserError
    from distill.generation.merge import merge

    if len(folders) < 2:
        raise UserError("expected `distill traces merge OUT RUN...`: the run folder to fill, and those to fill it from")
    out, *runs = map(Path, folders)
    typer.echo(merge(out, runs))


def _stages(stages: list[str], recipe: str, overrides: list[str] | None, runs_dir: Path) -> None:
    from distill.pipeline import run_stages

    run_stages(stages, *_recipe_and_folder(recipe, overrides, runs_dir))


def _recipe_and_folder(name: str, overrides: list[str] | None, runs_dir: Path) -> "tuple[Recipe, Path]":
    """A run folder given as such is used where it lies; else the recipe's name picks the folder in `runs_dir`."""
    from distill.recipe_load import load_recipe

    recipe = load_recipe(name, overrides or [])
    given = Path(name)
    return recipe, given if given.is_dir() else runs_dir / recipe.name


def _must_exist(folder: Path) -> None:
    from distill.errors import UserError

    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; `distill run` makes it")


def _config(name: str) -> Path:
    from distill.errors import UserError
    from distill.shipped import resolve_config

    path = resolve_config(name)
    if path is None or path.is_dir():
        raise UserError(f"{name}: no such training configuration file")
    return path

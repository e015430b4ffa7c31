"""The DeepSeekMoE ablation: few large experts, fine-grained ones, a shared one, and three ways to balance them.

    python -m tests.bench.moe_ablation          # 5 arms x 3 seeds, two processes of one thread: docs/moe-ablation.md
    python -m tests.bench.moe_ablation --set training.total_tokens=40960 --set exam_problems=14     # a rehearsal
    python -m tests.bench.moe_ablation_report   # the table and the curves of the log

After DeepSeekMoE (arXiv 2401.06066, section 4 and figure 3) and loss-free balancing (2408.15664), with the training
loop and the corpus of the shipped teacher. A run is `configs/teacher/moe-ablation.yaml` with the changes of its arm;
runs of one seed read the same examples in the same order. Killed and started again, it goes on from the last
checkpoint of an unfinished run and repeats no finished one. The log gets a line a run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

CONFIG = "configs/teacher/moe-ablation.yaml"
RUNS, LOG = Path("runs/moe-ablation"), Path("docs/moe-ablation.jsonl")
SEEDS = (1, 2, 3)


def _experts(size: int, shared: int, routed: int, active: int) -> list[str]:
    """A routed expert weighs 1 on average (the factor is their number), as a shared one does: cutting an expert in
    four then changes what can be chosen, not the size of what comes out."""
    return [
        f"model.moe_intermediate_size={size}", f"model.n_shared_experts={shared}", f"model.n_routed_experts={routed}",
        f"model.num_experts_per_tok={active}", f"model.routed_scaling_factor={active}.0",
    ]  # fmt: skip


ARMS: dict[str, list[str]] = {
    "a: 2 of 16 large": _experts(128, 0, 16, 2),
    "b: 8 of 64 fine": _experts(32, 0, 64, 8),
    "c: 7 of 63 fine + 1 shared": _experts(32, 1, 63, 7),
    # DeepSeekMoE's expert-level balance loss and its factor (sections 3.3, 4.1.3), a sequence at a time as DeepSeek's
    # code has it, for sigmoid affinities as V3 writes it (eq. 17-20).
    "d: c, auxiliary loss for bias": [
        *_experts(32, 1, 63, 7),
        "training.balance_speed=0",
        "training.balance_loss=0.01",
    ],
    "e: c, not balanced": [*_experts(32, 1, 63, 7), "training.balance_speed=0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a change of every run")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs")
    parser.add_argument("--log", type=Path, default=LOG, help="where the results go, a line a run")
    parser.add_argument("--only", nargs=2, metavar=("ARM", "SEED"), help="one run, in this process")
    arguments = parser.parse_args()
    if arguments.only:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        return run(arguments.only[0], int(arguments.only[1]), arguments.set, arguments.runs)
    waiting = [(arm, seed) for seed in SEEDS for arm in ARMS]
    lock, failed = threading.Lock(), list[str]()

    def worker() -> None:
        while not failed:
            with lock:
                if not waiting:
                    return
                arm, seed = waiting.pop(0)
            if not (folder(arguments.runs, arm, seed, arguments.set) / "result.json").exists():
                command = [sys.executable, "-m", "tests.bench.moe_ablation", "--runs", str(arguments.runs)]
                command += ["--only", arm, str(seed), *(f"--set={change}" for change in arguments.set)]
                # The pipe is never written to: it ends when this process does, however that happens.
                with subprocess.Popen(
                    command, stdin=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
                ) as child:
                    if child.wait() != 0:
                        failed.append(f"{arm}, seed {seed}")
            with lock:
                _write_log(arguments)

    workers = [threading.Thread(target=worker) for _ in range(2)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _write_log(arguments: argparse.Namespace) -> None:
    from distill.files import write_atomic

    paths = [folder(arguments.runs, arm, seed, arguments.set) / "result.json" for arm in ARMS for seed in SEEDS]
    done = [json.loads(path.read_text()) for path in paths if path.exists()]
    write_atomic(arguments.log, "".join(json.dumps(result) + "\n" for result in done).encode())
    print(f"{len(done)} of {len(paths)} runs done, {sum(r['cpu_seconds'] for r in done):,.0f} CPU seconds", flush=True)


def configuration(arm: str, seed: int, changes: Sequence[str]) -> Any:
    """The run's whole configuration (TeacherTraining)."""
    from distill.training_config import TeacherTraining, load_training_config

    return load_training_config(CONFIG, [f"seed={seed}", *ARMS[arm], *changes], TeacherTraining)


def folder(runs: Path, arm: str, seed: int, changes: Sequence[str]) -> Path:
    """Named by all that the run depends on: other settings are another run."""
    from distill.files import sha256_json

    settings = configuration(arm, seed, changes).model_dump()
    return runs / f"{arm.split(':')[0]}-{seed}-{sha256_json(settings)[:8]}"


def run(arm: str, seed: int, changes: Sequence[str], runs: Path) -> None:
    """Train one arm with one seed, and write result.json into its folder."""
    import torch
    from transformers import AutoTokenizer

    from distill.files import write_json_atomic
    from distill.procedural import reasoning_gym_problems
    from distill.shipped import resolve_model
    from distill.teacher_training import Examples
    from distill.training_config import settings_from
    from distill.worked.corpus import WorkedExample, WorkedProblems, solve
    from teacher import load_model
    from teacher.config import DeepseekV3Config
    from teacher.train import train
    from teacher.train_settings import TrainSettings

    torch.set_num_threads(1)
    config, out = configuration(arm, seed, changes), folder(runs, arm, seed, changes)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny-r1"))
    examples = Examples(WorkedProblems(config.families, seed), tokenizer)
    found = list(islice(reasoning_gym_problems(config.families, 0, "heldout"), config.exam_problems))  # for all seeds
    solved = [(p["meta"]["family"], p["problem"]) for p in found]
    exam = Examples([WorkedExample(family, text, solve(family, text)) for family, text in solved], tokenizer)
    hook = held_out([(family, exam(number)) for number, (family, _) in enumerate(solved)], _spent(out))
    settings = settings_from(config.training, TrainSettings, f"{CONFIG}: training", data=f"seed {seed}")
    torch.manual_seed(seed)
    fields = {"model_type": "deepseek_v3", "vocab_size": len(tokenizer), **config.model}
    model = load_model(DeepseekV3Config.from_dict(fields), dtype=torch.float32)
    result = train(model, examples, settings, out, eval_hook=hook)

    rows = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    late = rows[-max(1, len(rows) // 5) :]
    means = {f"{name}_late": sum(row[name] for row in late) / len(late) for name in ("loss", "max_vio_mean")}
    curve = [{"tokens": row["tokens"], **row["eval"]} for row in rows if "eval" in row]
    write_json_atomic(
        out / "result.json",
        {"arm": arm, "seed": seed, "changes": list(changes), "commit": _commit(), "torch": torch.__version__}
        | {"steps": result.steps, "tokens": result.tokens, "wall_seconds": round(result.seconds)}
        | {"cpu_seconds": curve[-1]["cpu_seconds"], **sizes(model), **means, "curve": curve},
    )
    shutil.rmtree(out / "checkpoints")


def held_out(examples: Sequence[tuple[str, Any]], spent: float) -> Callable[[Any, int], dict[str, Any]]:
    """An eval hook: cross entropy a response token, in nats; the share of problems whose whole response is the model's
    first choice, token by token, which is what greedy decoding would then write; and the experts' load.

    spent: CPU seconds of earlier attempts.
    """
    import torch
    import torch.nn.functional as F

    from teacher.balance import LoadBalance, max_violation

    ids, segments, targets = list[int](), list[int](), list[int]()
    for number, (_, example) in enumerate(examples, start=1):
        tokens, start = example["input_ids"], example["loss_start"]
        ids += tokens
        segments += [number] * len(tokens)
        targets += [-100] * (start - 1) + tokens[start:] + [-100]
    ids_1T, segments_1T, targets_T = torch.tensor([ids]), torch.tensor([segments]), torch.tensor(targets)

    def evaluate(model: Any, step: int) -> dict[str, Any]:
        out = model(ids_1T, None, segments_1T, logits=False)
        asked = targets_T >= 0
        logits_NV = model.lm_head(out.hidden[0, asked])
        wrong = (logits_NV.argmax(-1) != targets_T[asked]).float()
        wrong_S = torch.zeros(len(examples) + 1).index_add(0, segments_1T[0, asked], wrong)[1:]
        families = defaultdict(list)
        for (family, _), mistakes in zip(examples, wrong_S.tolist(), strict=True):
            families[family].append(mistakes == 0)
        return {
            "loss": F.cross_entropy(logits_NV, targets_T[asked]).item(),
            "solved": (wrong_S == 0).float().mean().item(),
            "families": {family: sum(right) / len(right) for family, right in sorted(families.items())},
            "max_vio": max_violation(LoadBalance(model).loads(out.routing, segments_1T)).tolist(),
            "cpu_seconds": round(spent + time.process_time(), 1),
        }

    return evaluate


def sizes(model: Any) -> dict[str, int]:
    """Parameters of the model; of all its experts, shared ones included; of those that one token meets; of routers."""
    from teacher.experts import MoE

    config, layers = model.config, [m for m in model.modules() if isinstance(m, MoE)]
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    experts = len(layers) * expert * (config.n_routed_experts + config.n_shared_experts)
    assert experts == sum(p.numel() for m in layers for p in m.parameters()) - sum(
        m.gate.weight.numel() for m in layers
    )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "expert_parameters": experts,
        "active_expert_parameters": len(layers) * expert * (config.num_experts_per_tok + config.n_shared_experts),
        "router_parameters": sum(m.gate.weight.numel() for m in layers),
    }


def _spent(out: Path) -> float:
    """CPU seconds of the attempts before this one, up to their last evaluation."""
    path = out / "training_log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return max((row["eval"]["cpu_seconds"] for row in rows if "eval" in row), default=0.0)


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], capture_output=True, text=True)
    return found.stdout.strip()


if __name__ == "__main__":
    main()

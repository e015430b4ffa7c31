"""Memory and time of loading a checkpoint, ours beside transformers, each load in a process of its own.

    python -m tests.bench.load [--rounds 3] [--device cuda] [--layers 8] [--shard-mb 0]

Writes a random DeepSeek-V3-shaped checkpoint twice, in bf16 and in block FP8 (both hold the same model), into one file
each (the worst case for what is mapped at a time) or into shards, and loads each to bf16. Peaks are above what the
process held before loading, as shares of the model's bytes in memory: `anonymous` is memory that only the process
holds; `total` adds the pages of the files that are mapped at the time, which the system takes back when it needs them.
With --device cuda it is the CPU's memory all the same, which should stay near zero, and the GPU's peak beside it.
Then the time to build DeepSeek-V3 of 671B on the meta device. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def memory() -> dict[str, int]:
    """Bytes by the names of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


class Peak:
    """The highest anonymous memory seen while inside, and the kernel's own mark of the highest total."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
        self.before = memory()
        self.anonymous = self.before["RssAnon"]
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        self.start = time.perf_counter()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.001):
            self.anonymous = max(self.anonymous, memory()["RssAnon"])

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.done.set()
        self.watcher.join()
        after = memory()
        self.anonymous = max(self.anonymous, after["RssAnon"]) - self.before["RssAnon"]
        self.total = after["VmHWM"] - self.before["VmRSS"]


def load(side: str, folder: str, device: str) -> dict[str, float]:
    """One load, in this process."""
    import torch

    torch.set_num_threads(1)
    if device != "cpu":
        torch.zeros(1, device=device)  # the driver's own memory is not the load's
    if side == "ours":
        from teacher import load_model
        from teacher.checkpoint_read import load_checkpoint

        assert load_checkpoint
        with Peak() as peak:
            model = load_model(folder, "bfloat16", device)
    else:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        assert transformers.DeepseekV3ForCausalLM and transformers.AutoModelForCausalLM
        extra = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)} if "fp8" in folder else {}
        with Peak() as peak:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map=None if device == "cpu" else {"": device}, **extra
            )
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    on_gpu = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    checksum = float(model.lm_head.weight[:100].detach().double().abs().sum())
    return {"bytes": size, "anonymous": peak.anonymous, "total": peak.total, "seconds": peak.seconds,
            "gpu": on_gpu, "checksum": checksum}  # fmt: skip


def write(folder: str, layers: int, shard_bytes: int) -> None:
    """The checkpoint in bf16 and in FP8. Dimensions are whole blocks: transformers cannot dequantise ragged ones."""
    import torch

    from teacher import load_model
    from teacher.checkpoint_write import save_checkpoint
    from teacher.config import DeepseekV3Config

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=16384, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=512, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, n_routed_experts=32, num_experts_per_tok=4, n_group=4,
        topk_group=2, first_k_dense_replace=1, num_nextn_predict_layers=0, q_lora_rank=512, kv_lora_rank=448,
    )  # fmt: skip
    model = load_model(config, "bfloat16")
    save_checkpoint(model, Path(folder) / "bf16", shard_bytes=shard_bytes)
    save_checkpoint(model, Path(folder) / "fp8", shard_bytes=shard_bytes, fp8=True)


def build_671b() -> dict[str, float]:
    start = time.perf_counter()
    from teacher.config import DeepseekV3Config
    from teacher.model import DeepseekV3

    imported = time.perf_counter()
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1, "mscale_all_dim": 1}
    model = DeepseekV3.on_meta(DeepseekV3Config(max_position_embeddings=163840, rope_scaling=yarn))
    built = time.perf_counter()
    main = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("model.layers.61."))
    rss = memory()["VmRSS"]
    return {"import": imported - start, "build": built - imported, "parameters": main, "rss": rss}


def child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.load", "--child", *arguments]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shard-mb", type=int, default=0, help="0: one file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        task, *rest = settings.child
        if task == "write":
            write(rest[0], int(rest[1]), int(rest[2]))
        print(json.dumps(load(*rest) if task == "load" else build_671b() if task == "671b" else {}))
        return
    with tempfile.TemporaryDirectory() as folder:
        child("write", folder, str(settings.layers), str(settings.shard_mb * 2**20 or 2**60))
        for form in ("bf16", "fp8"):
            on_disk = sum(path.stat().st_size for path in (Path(folder) / form).glob("*.safetensors"))
            runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
            for _ in range(settings.rounds):
                for side, results in runs.items():
                    results.append(child("load", side, f"{folder}/{form}", settings.device))
            size = runs["ours"][0]["bytes"]
            assert {run["bytes"] for results in runs.values() for run in results} == {size}
            assert len({run["checksum"] for results in runs.values() for run in results}) == 1
            print(f"{form}: {on_disk / 1e6:.0f} MB on disk, {size / 1e6:.0f} MB in memory as bf16 on {settings.device}")
            for side, results in runs.items():
                seconds = [run["seconds"] for run in results]
                line = f"  {side:12}"
                for name in ("anonymous", "total", "gpu")[: 2 if settings.device == "cpu" else 3]:
                    line += f"  {name} {max(run[name] for run in results) / size:.2f}x"
                print(f"{line}  {statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})")
    built = child("671b")
    print(f"671B on meta: {built['parameters'] / 1e9:.1f}B parameters built in {built['build']:.2f} s after "
          f"{built['import']:.2f} s of imports, {built['rss'] / 1e6:.0f} MB resident")  # fmt: skip


if __name__ == "__main__":
    main()

"""Side by side: lm-eval's HFLM.generate_until and ours, on one random student of the demo's size.

    OMP_NUM_THREADS=1 python -m tests.bench.decode [rounds]

Two workloads: `ramble`, where every sample runs to the token limit as an untrained base does, and `answer`, where
lengths differ as a trained student's do (here by the chance of an end token). Both sides get the same requests,
256 rows a batch, one torch thread. Printed: kept tokens a second of wall time and of the process's CPU time (the
fairer one on a busy machine), medians over the rounds, and the ratio.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Any

import torch

from evals.hf import HFBackend
from evals.lm import SamplingLM
from tests.tiny import tokenizer as byte_tokenizer

PROBLEMS, SAMPLES, NEW, BATCH = 128, 4, 200, 256


def student(folder: str) -> str:
    """Qwen2, 1M parameters: hidden 128, 5 layers, 4 query and 2 key-value heads, 400 tokens. Returns the folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=400, hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def end_sometimes(model: Any, bias: float) -> None:
    """Give the end token a fixed logit and the ids without a text none."""

    def shift(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., 257] = bias
        output[..., 263:] = -30
        return output

    model.lm_head.register_forward_hook(shift)


def instances(settings: dict[str, Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    made = []
    for number in range(PROBLEMS):
        doc = {"id": f"p{number}", "answer": "1", "kind": "math", "family": ""}
        text = f"<｜begin▁of▁sentence｜><｜User｜>What is {number} + {number * 7}?<｜Assistant｜><think>\n"
        one = Instance("generate_until", doc, (text, dict(settings)), 0, metadata=("t", number, SAMPLES))
        made += [one] * SAMPLES
    return made


def timed(work: Any) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def compare(folder: str, workload: str, bias: float, rounds: int) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_gen_toks": NEW, "until": []}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2)]
    for model in models:
        end_sometimes(model, bias)
    theirs = HFLM(pretrained=models[0], tokenizer=tokenizer, batch_size=BATCH, add_bos_token=False)
    ours = SamplingLM(HFBackend(tokenizer, lambda: models[1], batch_size=BATCH), model_name="m", revision="r")
    speeds: dict[str, list[tuple[float, float]]] = {"HFLM": [], "ours": []}
    for _ in range(rounds):
        wall, cpu, texts = timed(lambda: theirs.generate_until(instances(settings), disable_tqdm=True))
        tokens = sum(min(NEW, len(tokenizer(t, add_special_tokens=False)["input_ids"]) + 1) for t in texts)
        speeds["HFLM"].append((tokens / wall, tokens / cpu))
        wall, cpu, _ = timed(lambda: ours.generate_until(instances(settings)))
        tokens = sum(row["tokens"] for row in ours.rows)
        speeds["ours"].append((tokens / wall, tokens / cpu))
    mean = statistics.mean(row["tokens"] for row in ours.rows)
    for unit, index in (("wall s", 0), ("CPU s", 1)):
        a, b = (statistics.median(pair[index] for pair in speeds[name]) for name in ("HFLM", "ours"))
        print(f"{workload:7} mean {mean:5.1f} tokens  tokens/{unit:6}  HFLM {a:8.0f}  ours {b:8.0f}  x{b / a:.2f}")


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    folder = student(tempfile.mkdtemp())
    for workload, bias in (("ramble", -30.0), ("answer", 1.5)):
        compare(folder, workload, bias, rounds)


if __name__ == "__main__":
    main()

"""One contestant of tests/bench/engine.py in a process of its own, so that each has its own environment and threads.

Started as `python -m tests.bench.engine_child`; speaks JSON lines. The first line in says who it is ("side": ours,
transformers or vllm; "model", "dtype", "threads", "max_len" and the side's own options), each further one is a job:

    {"prompts": [[ids]], "lengths": [most new tokens], "temperature": t, "top_p": p, "seed": n, "stop": bool, ...}

and is answered by {"start", "end" (seconds of the machine's monotonic clock), "cpu" (seconds of all the process's
threads), "tokens": [[ids]]}. Without "stop" nothing ends before its length, whatever it says. Prompts are token ids:
nobody tokenises, nobody decodes. Each job starts with an empty prefix cache. Imports nothing at the top but the
standard library: vLLM's environment has none of this repository's dependencies.
"""

import json
import os
import sys
import time
from typing import Any

Job = dict[str, Any]


class Ours:
    """teacher.engine.Engine. A new engine for each job, made before the clock starts."""

    def __init__(self, setup: Job) -> None:
        import torch

        from teacher import load_model

        torch.set_num_threads(setup["threads"])
        self.setup, self.model = setup, load_model(setup["model"], dtype=getattr(torch, setup["dtype"]))

    def prepare(self, job: Job) -> Any:
        from teacher.engine import Engine
        from teacher.requests import Request

        ends: list[int] | None = None if job["stop"] else []
        lengths = job["lengths"]
        requests = [
            Request(str(n), ids, job["temperature"], job["top_p"], max_tokens=lengths[n], seed=n, stop_ids=ends)
            for n, ids in enumerate(job["prompts"])
        ]
        engine = Engine(self.model, batch_size=256, max_len=self.setup["max_len"], threads=self.setup["threads"])

        def work() -> list[list[int]]:
            done = {c.id: c for c in engine.generate(requests)}
            found = (done[str(n)] for n in range(len(requests)))
            return [c.token_ids + ([] if c.stop_id is None else [c.stop_id]) for c in found]

        return work


class Transformers:
    """generate of DeepseekV3ForCausalLM in batches of "batch", prompts padded on the left, in the order given.

    A row's own length ends it by a stopping criterion, so a batch runs as long as its longest row.
    """

    def __init__(self, setup: Job) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(setup["threads"])
        self.model = AutoModelForCausalLM.from_pretrained(
            setup["model"], dtype=getattr(torch, setup["dtype"]), experts_implementation=setup["experts"]
        ).eval()
        self.stop_id = self.model.generation_config.eos_token_id
        self.pad_id = self.model.config.pad_token_id
        # generate fills what a call leaves open from here, so an end token "None" in a call would not be none.
        self.model.generation_config.eos_token_id = None

    def prepare(self, job: Job) -> Any:
        import torch

        torch.manual_seed(job["seed"])

        def work() -> list[list[int]]:
            size, out = job["batch"], []
            for start in range(0, len(job["prompts"]), size):
                end = start + size
                out += self.batch(job["prompts"][start:end], job["lengths"][start:end], job)
            return out

        return work

    def batch(self, prompts: list[list[int]], lengths: list[int], job: Job) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        settings: Job = {"do_sample": False}
        if job["temperature"]:
            settings = {"do_sample": True, "temperature": job["temperature"], "top_p": job["top_p"], "top_k": 0}
        if job["stop"]:
            settings["eos_token_id"] = self.stop_id
        if job["cache"] == "static":
            settings["cache_implementation"] = "static"
        config = GenerationConfig(max_new_tokens=max(lengths), pad_token_id=self.pad_id, **settings)
        ends = torch.tensor(lengths) + width

        def ended(so_far: Any, scores: Any, **_: Any) -> Any:
            return so_far.shape[1] >= ends

        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=[ended])
        rows = [row[:length] for row, length in zip(out[:, width:].tolist(), lengths, strict=True)]
        if not job["stop"]:
            return rows
        return [row[: row.index(self.stop_id) + 1] if self.stop_id in row else row for row in rows]


class VLLM:
    """vLLM's LLM in this process, no tokenizer, settings as its CPU guide has them.

    The small latent sizes of tiny-r1 have no MLA kernel on a CPU: it runs as ordinary attention there.
    """

    def __init__(self, setup: Job) -> None:
        os.environ |= {
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_MLA_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        from vllm import LLM  # type: ignore[import-not-found]

        self.llm = LLM(
            setup["model"], dtype=setup["dtype"], enforce_eager=setup["mode"] == "eager", max_num_seqs=256,
            max_model_len=setup["max_len"], gpu_memory_utilization=0.3, skip_tokenizer_init=True,
        )  # fmt: skip
        self.stop_ids = [setup["eos"]]

    def prepare(self, job: Job) -> Any:
        from vllm import SamplingParams

        settings = {"temperature": job["temperature"], "top_p": job["top_p"], "detokenize": False, "ignore_eos": True}
        if job["stop"]:
            settings |= {"stop_token_ids": self.stop_ids}
        params = [SamplingParams(max_tokens=length, **settings) for length in job["lengths"]]
        prompts: Any = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        self.llm.reset_prefix_cache()

        def work() -> list[list[int]]:
            return [list(x.outputs[0].token_ids) for x in self.llm.generate(prompts, params, use_tqdm=False)]

        return work


SIDES: dict[str, Any] = {"ours": Ours, "transformers": Transformers, "vllm": VLLM}


def main() -> None:
    # What libraries print goes to stderr; the answers have the real stdout for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.readline())
    side = SIDES[setup["side"]](setup)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        work = side.prepare(json.loads(line))
        cpu, start = time.process_time(), time.monotonic()
        tokens = work()
        end = time.monotonic()
        answers.write(
            json.dumps({"start": start, "end": end, "cpu": time.process_time() - cpu, "tokens": tokens}) + "\n"
        )


if __name__ == "__main__":
    main()

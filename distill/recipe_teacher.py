"""The recipe's sections about making traces: who writes them, how they are sampled, and what that may cost."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distill.recipe_base import Section

R1_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class Endpoint(Section):
    url: str = Field(pattern=r"^https?://[^\s?#]+$", description="Base URL with its version: http://host:8000/v1.")
    key: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Environment variable that holds the key; never the key."
    )
    model: str | None = Field(None, description="The model's name there, where it is not `teacher.model`.")
    weight: float = Field(1.0, gt=0, le=1e6, description="Share of the work while several endpoints have room.")
    concurrency: int = Field(
        1024, ge=1, le=65536, description="Most requests in flight; how many pay is found by itself below this."
    )
    prompt_price: float = Field(0.0, ge=0, description="Price of a million prompt tokens.")
    completion_price: float = Field(0.0, ge=0, description="Price of a million generated tokens.")
    gpus: float = Field(0.0, ge=0, description="GPUs behind it, for GPU-hours a trace.")


class Vllm(Section):
    tensor_parallel: int | None = Field(None, ge=1, description="GPUs a layer is split over; from the machine if null.")
    pipeline_parallel: int = Field(1, ge=1, description="Groups of GPUs that hold consecutive layers.")
    data_parallel: int = Field(1, ge=1, description="Copies of attention (and of the model without experts).")
    expert_parallel: bool | None = Field(None, description="Whole experts on each GPU; null: where there are experts.")
    quantization: str | None = Field(None, description="As vLLM names it ('fp8'); null: what the checkpoint says.")
    kv_cache_dtype: str = Field("auto", description="As vLLM names it: 'auto', 'fp8'.")
    max_model_len: int | None = Field(None, ge=16, description="Tokens of context; null: what the recipe needs.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of a device's memory that vLLM takes.")
    speculate: int = Field(0, ge=0, le=16, description="Tokens drafted ahead by the model's own MTP layer.")
    python: str | None = Field(None, description="Interpreter of the environment that has vLLM, if not this one.")
    args: dict[str, Any] = Field(default_factory=dict, description="Further engine arguments, by vLLM's names.")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class Teacher(Section):
    kind: Literal["embedded", "endpoint", "vllm", "recorded"] = Field(
        "embedded",
        description="'embedded': our own engine, in this process; 'endpoint': OpenAI-compatible servers; 'vllm': vLLM "
        "on this node; 'recorded': whoever wrote `traces`.",
    )
    model: str = Field(min_length=1, description="A shipped model's name, a checkpoint folder or a hub name.")
    revision: str | None = Field(None, description="Which version of the model, where no folder's content can say.")
    batch_size: int = Field(256, ge=1, le=65536, description="Samples decoded at once (embedded, vllm).")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Numeric type of weights and activations; null: float32 embedded, vLLM's choice in vLLM."
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="Where our engine runs: 'cpu' or 'cuda'.")
    experts: Literal["fp8"] | None = Field(
        None, description="'fp8': our engine keeps routed experts in FP8, by Triton kernels on a Hopper GPU."
    )
    weights: Literal["fp8"] | None = Field(
        None, description="'fp8': all that DeepSeek's FP8 checkpoints hold so, attention and shared experts included."
    )
    endpoints: Annotated[list[Endpoint], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="Servers of kind 'endpoint', all of the same model."
    )
    api: Literal["chat", "completions"] = Field(
        "chat", description="'completions': the prompt is rendered here, with `tokenizer`'s chat template."
    )
    tokenizer: str | None = Field(
        None, description="Folder or hub name, for `api: completions` and kind 'vllm'; null: `model`."
    )
    think: Literal["auto", "force", "leave"] = Field(
        "auto",
        description="'force': the reply starts after '<think>\\n'; 'leave': as the template ends; 'auto': forced where "
        "a template that can be read does not do it.",
    )
    stream: bool = Field(True, description="Replies token by token, so that a server gone silent is noticed.")
    idle_timeout: float = Field(300.0, gt=0, description="Seconds without a byte after which a request has failed.")
    timeout: float = Field(7200.0, gt=0, description="Seconds that a whole request may take.")
    attempts: int = Field(8, ge=1, le=1000, description="Tries a sample in one start, before it is left for the next.")
    body: dict[str, Any] = Field(default_factory=dict, description="Further fields of each request, such as top_k.")
    vllm: Vllm = Field(default_factory=Vllm, description="Settings of kind 'vllm' and of `distill teacher serve`.")

    @model_validator(mode="after")
    def _endpoints_belong(self) -> "Teacher":
        if (self.kind == "endpoint") != bool(self.endpoints):
            raise ValueError("`endpoints` and kind 'endpoint' go together; found one without the other")
        reserved = sorted({"model", "messages", "prompt", "stream", "n", "seed", "max_tokens"} & self.body.keys())
        if reserved:
            raise ValueError(f"body: {reserved[0]!r} is set by the recipe's other fields")
        return self


class Adaptive(Section):
    verified: int = Field(1, ge=1, description="Right samples that are enough for a problem.")
    most: int = Field(ge=1, le=10000, description="Most samples a problem; `sampling.samples` are asked for at first.")


class Sampling(Section):
    samples: int = Field(ge=1, le=10000, description="Traces sampled a problem.")
    temperature: float = Field(0.6, ge=0, le=2, description="0 is greedy; R1's published setting is 0.6.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus size; R1's published setting is 0.95.")
    max_tokens: int = Field(
        32768, ge=1, description="Most tokens generated a sample; longer ones are truncated, marked and kept."
    )
    instruction: str = Field(R1_INSTRUCTION, description="Appended to the problem after a newline; empty for none.")
    logprobs: int = Field(0, ge=0, le=20, description="The teacher's likeliest tokens kept at each position; 0: none.")
    adaptive: Adaptive | None = Field(
        None, description="Stop a problem once enough of its samples are right, and give hard ones more."
    )

    @model_validator(mode="after")
    def _most_is_most(self) -> "Sampling":
        if self.adaptive is not None and self.adaptive.most < self.samples:
            raise ValueError(f"adaptive.most is {self.adaptive.most}, below the {self.samples} samples asked for first")
        return self


class Budget(Section):
    cost: float | None = Field(None, gt=0, description="Most money, in the currency of the endpoints' prices.")
    tokens: int | None = Field(None, ge=1, description="Most tokens, prompts and replies together.")
    hours: float | None = Field(None, gt=0, description="Longest time, over all starts.")
    hard: bool = Field(
        False,
        description="Never pass `cost` or `tokens`: of each sample in flight its most is set aside, not what it is "
        "expected to take.",
    )

"""The teacher as an lm-eval model: our engine generates, our forward scores, in place of transformers'.

    python -m distill.lm_eval --model distill-teacher --model_args pretrained=tiny-r1 --tasks ... [--include_path ...]
    import distill.lm_eval_teacher; lm_eval.simple_evaluate(model="distill-teacher", model_args=..., tasks=[...])

Means what lm-eval's HFLM means, number by number, with two exceptions: a prompt is never shortened as long as one token
behind it fits the context (HFLM cuts its beginning to keep room for max_gen_toks), and samples have seeds of their own,
so they depend neither on the batch nor on the other tasks. distill.lm_eval says how lm-eval finds this file.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any

import jinja2
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]

from distill.embedded import open_model, teacher_id
from distill.errors import UserError
from distill.lm_eval import NAME

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from teacher.requests import Completion, Request

_log = logging.getLogger(__name__)
BATCH_SIZE = 256
# What a task may ask of a generation, and what some ask for that changes nothing.
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed"}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}


@register_model(NAME)
class TeacherLM(TemplateLM):
    """`pretrained`: a model folder or a shipped model's name. As in HFLM: dtype, device, max_length, add_bos_token,
    prefix_token_id, think_end_token, enable_thinking, chat_template_args.

    batch_size: most sequences decoding together; "auto" and 1, which is what lm-eval passes when nobody asks for
    anything, mean 256, and max_batch_size bounds it. It changes memory and speed, not results. batch_tokens: most
    tokens scored together. max_gen_toks: for tasks that name none. seed: of the samples; default torch's, which
    lm-eval's --seed sets. Raises UserError naming an argument that is wrong or unknown.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        import torch

        super().__init__()
        _refuse(unknown)
        if not isinstance(pretrained, str) or not pretrained:
            raise UserError(f"pretrained is {pretrained!r}; expected a model folder or the name of a shipped model")
        if enable_thinking and think_end_token is None:
            raise UserError("enable_thinking is set; think_end_token must say where the thinking ends")
        size = BATCH_SIZE if str(batch_size) == "1" or str(batch_size).startswith("auto") else batch_size
        self.batch_size = _whole("batch_size", size)
        if max_batch_size is not None:
            self.batch_size = min(self.batch_size, _whole("max_batch_size", max_batch_size))
        self.batch_tokens = None if batch_tokens is None else _whole("batch_tokens", batch_tokens)
        self.max_gen_toks = _whole("max_gen_toks", max_gen_toks)
        self.seed = torch.initial_seed() if seed is None else _whole("seed", seed, least=0)
        self._device = _device(device)
        opened = open_model(pretrained, None if dtype == "auto" else dtype, str(self._device), "pretrained")
        self.pretrained, self.model, self.tokenizer = pretrained, opened.model, opened.tokenizer
        context = self.model.config.max_position_embeddings
        self.max_length = context if max_length is None else _whole("max_length", max_length, least=2)
        if self.max_length > context:
            raise UserError(f"max_length is {self.max_length}; the model's context is {context} tokens")
        # As HFLM, which stops at the generation config's ids and at the tokenizer's.
        self.stop_ids = sorted({*opened.stop_ids, self.eot_token_id})
        self.add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        if add_bos_token is not None:
            self.tokenizer.add_bos_token = add_bos_token
        digits = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(think_end_token) if digits and think_end_token else think_end_token
        self.enable_thinking = enable_thinking
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.chat_template_args = (chat_template_args or {}) | thinking

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What results.json says of the model; the hash is that of weights, configuration and tokenizer."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": self.model.lm_head.weight.dtype,
            "model_sha": teacher_id(self.pretrained).partition("@")[2],
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for a chat. A template that takes no system message gets the chat without it, as in HFLM."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt, **self.chat_template_args,
            )  # fmt: skip

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return render(others)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. The tokenizer adds its special tokens unless told otherwise or the text begins with its BOS."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = False if string.startswith(prefix) else self.add_bos_token
        asked = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **asked)

    def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise UserError("enable_thinking is set; a task that scores given answers cannot be run with it")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        from teacher.scoring import score

        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for index, found in score(self.model, pairs, self.max_length, self.batch_tokens):
                results[index] = (found.logprob, found.greedy)
                if (texts := requests[index][0]) is not None:  # None: part of a document, see below
                    self.cache_hook.add_partial("loglikelihood", texts, results[index])
                bar.update()
        return results

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Whole documents: each token once, in windows of max_length that begin with the prefix token."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            tokens = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            made = [(None, *make_disjoint_window(window)) for window in tokens]
            windows += made
            counts.append(len(made))
        parts = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(parts)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop string. For k samples lm-eval repeats an Instance: each copy has its own seed."""
        copies: Counter[Any] = Counter()
        asked, stops = [], []
        for index, instance in enumerate(requests):
            sample = (instance.task_name, instance.doc_id, instance.args[0])
            request, until = self._request(str(index), instance, copies[sample])
            copies[sample] += 1
            asked.append(request)
            stops.append(until)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for completion in self._complete(asked):
                index = int(completion.id)
                texts[index] = self._answer(completion.token_ids, stops[index])
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                bar.update()
        return texts

    def _request(self, identity: str, instance: "Instance", copy: int) -> tuple["Request", list[str]]:
        """What the engine is asked for one sample, and the stop strings. Raises UserError for an unknown setting."""
        from evals.sampling import seed_of
        from teacher.requests import Request

        context, settings = instance.args
        task, doc = str(instance.task_name), str(instance.doc_id)
        asked = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        for name in sorted(asked.keys() - _GENERATION):
            if name not in _NEUTRAL or asked[name] != _NEUTRAL[name]:
                raise UserError(
                    f"generation_kwargs of {task}: {name}={asked[name]!r} is not known to this model; "
                    f"there are {', '.join(sorted(_GENERATION))}"
                )
        until = handle_stop_sequences(asked["until"], self.tokenizer.decode(self.eot_token_id))
        # Stop strings are meant for the answer; the thinking before it may hold them, too.
        stop = [text for text in until if text and self.think_end_token is None]
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        wanted = asked["max_gen_toks"]
        if len(prompt) >= self.max_length:
            prompt = prompt[-max(self.max_length - wanted, self.max_length // 2) :]
            _log.warning("a prompt of %s fills the context of %d tokens; its beginning is cut", task, self.max_length)
        return Request(
            identity,
            prompt,
            temperature=float(asked.get("temperature", 0.0)),
            top_p=float(asked.get("top_p", 1.0)),
            top_k=int(asked.get("top_k", 0)),
            min_p=float(asked.get("min_p", 0.0)),
            max_tokens=min(wanted, self.max_length - len(prompt)),
            seed=seed_of(int(asked.get("seed", self.seed)), task, doc, context, copy),
            stop_ids=self.stop_ids,
            stop=stop,
        ), until

    def _complete(self, requests: list["Request"]) -> Iterator["Completion"]:
        from teacher.engine import Engine

        if not requests:
            return
        longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
        engine = Engine(self.model, self.tokenizer, min(self.batch_size, len(requests)), longest)
        yield from engine.generate(requests)

    def _answer(self, token_ids: list[int], until: list[str]) -> str:
        """The text that counts: behind the thinking, if think_end_token says where that ends, up to a stop string."""
        end = self.think_end_token
        if isinstance(end, int):
            if end in token_ids:
                token_ids = token_ids[len(token_ids) - token_ids[::-1].index(end) :]
            text = self.tokenizer.decode(token_ids, skip_special_tokens=True).lstrip()
            return postprocess_generated_text(text, until, None)
        return postprocess_generated_text(self.tokenizer.decode(token_ids, skip_special_tokens=True), until, end)


def _refuse(unknown: dict[str, Any]) -> None:
    """Raise UserError for the first argument of this model that does not exist, with the nearest that does."""
    for name in unknown:
        known = sorted({*signature(TeacherLM).parameters} - {"unknown"})
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"model_args: {name} is not known to {NAME}; {hint}")


def _whole(name: str, value: Any, least: int = 1) -> int:
    text = "" if isinstance(value, bool) else str(value)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return int(text)


def _device(name: str | None) -> Any:
    """The device of that name; a GPU if there is any where none is named, and the CPU where there is no GPU: "cuda:0"
    is what lm-eval's command passes by itself. Raises UserError if torch cannot use it."""
    import torch

    wanted = name or "cuda"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        wanted = "cpu"
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:  # torch built without that device may fail an assertion
        raise UserError(f"device is {name!r}, which torch cannot use: {str(error).splitlines()[0]}") from None

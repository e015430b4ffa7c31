"""teacher.kind 'embedded': the teacher runs in this process, on our own engine."""

import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.files import sha256_file, sha256_json
from distill.reasoning import closing_tag
from distill.records import Ask, Asks, EndpointState, Reply, TopLogprobs
from distill.shipped import resolve_model

if TYPE_CHECKING:
    from distill.recipe import Teacher
    from teacher.engine import Completion, Engine, Request
    from teacher.model import DeepseekV3
    from teacher.requests import TokenLogprobs

_CACHE_BYTES = 1 << 30  # of the engine's cache, at most; but it holds one sequence of the whole context
_PAUSE = 0.01  # seconds
# What decides the text that a model folder generates; its README and training logs do not.
_IDENTITY_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}


def teacher_folder(model: str, field: str = "teacher.model") -> Path:
    """The model's folder. Raises UserError if there is none or it lacks what an embedded teacher needs.

    `field` is what the user calls the setting that holds `model`.
    """
    found = resolve_model(model)
    folder = Path(found)
    if not folder.is_dir():
        raise UserError(f"{field}: '{model}' is neither a folder nor a shipped model")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected a model folder ({field})")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder}: no tokenizer.json; the teacher's folder needs its tokenizer ({field})")
    return folder


def teacher_id(model: str) -> str:
    """ "<name>@<12 hex>": the hash of the folder's weights, configuration and tokenizer, by file name and content."""
    folder = teacher_folder(model)
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _IDENTITY_SUFFIXES)
    digest = sha256_json([[p.name, sha256_file(p)] for p in files])
    return f"{folder.resolve().name}@{digest[:12]}"


def teacher_licence(model: str) -> str | None:
    """What the model card in the folder declares in its header, if anything. Raises UserError if that is not YAML."""
    import yaml

    card = teacher_folder(model) / "README.md"
    parts = card.read_text(encoding="utf-8").split("---\n", 2) if card.is_file() else []
    if len(parts) != 3 or parts[0].strip():
        return None
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise UserError(f"{card}: the header is not valid YAML ({' '.join(str(error).split())})") from None
    return str(header["license"]) if isinstance(header, dict) and "license" in header else None


@dataclass(frozen=True)
class OpenModel:
    """A model folder, loaded."""

    folder: Path
    model: "DeepseekV3"
    tokenizer: Any
    stop_ids: tuple[int, ...]  # what ends a completion


def open_model(model: str, dtype: str | None = None, device: str = "cpu", field: str = "teacher.model") -> OpenModel:
    """Load a teacher's folder; dtype None: the checkpoint's. Raises ValueError naming what is wrong with it."""
    from transformers import AutoTokenizer

    from teacher import load_model

    folder = teacher_folder(model, field)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: the tokenizer does not load: {str(error).splitlines()[0]}") from error
    weights = load_model(folder, dtype=dtype, device=device)
    if len(tokenizer) > weights.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {weights.config.vocab_size}; "
            "they do not belong together"
        )
    return OpenModel(folder, weights, tokenizer, _stop_ids(folder, tokenizer))


def identity(teacher: "Teacher") -> dict[str, Any]:
    """What the manifest says of the teacher, found without loading it: "id", "model", "kind" and "licence"."""
    found = {"id": teacher_id(teacher.model), "licence": teacher_licence(teacher.model)}
    return {"kind": teacher.kind, "model": teacher.model, **found}


class EmbeddedTeacher:
    """A loaded model with its tokenizer and engine; see distill.records.TeacherBackend."""

    def __init__(self, teacher: "Teacher") -> None:
        opened = open_model(teacher.model, teacher.dtype or "float32")
        if not opened.tokenizer.chat_template:
            raise UserError(f"{opened.folder}: the tokenizer has no chat template, so the teacher cannot be asked")
        self.id = teacher_id(teacher.model)
        self.batch_size = teacher.batch_size
        self.model, self.tokenizer, self.stop_ids = opened.model, opened.tokenizer, opened.stop_ids
        self.runs_in: str | None = None  # what the engine ran in, once it has: C, or torch several times as slowly
        self._in_flight = 0

    def generate(self, asks: Asks) -> Iterator[list[Reply]]:
        """See TeacherBackend. A prompt that fills the model's context is answered 'prompt_too_long'."""
        engine: Engine | None = None
        self._in_flight = 0
        while True:
            taken = asks.take(self.batch_size - self._in_flight) if self._in_flight < self.batch_size else []
            requests, replies = self._requests(taken)
            if requests and engine is None:
                engine = self._make_engine(requests, last=asks.closed)
            for request in requests:
                assert engine is not None
                engine.add(request)
            self._in_flight += len(requests)
            if self._in_flight:
                assert engine is not None
                done = [update.completion for update in engine.step() if update.completion is not None]
                self._in_flight -= len(done)
                replies += map(self._reply, done)
            elif not taken:
                if asks.closed:
                    return
                time.sleep(_PAUSE)  # what comes next hangs on replies that are being verified
            yield replies

    def states(self) -> dict[str, EndpointState]:
        return {self.id: EndpointState(self._in_flight, self.batch_size, True, {})}

    def _requests(self, asks: list[Ask]) -> "tuple[list[Request], list[Reply]]":
        """What to ask the engine, and the replies to what it cannot be asked."""
        from teacher.engine import Request

        limit = self.model.config.max_position_embeddings
        requests, replies = [], []
        for ask in asks:
            prompt = self._prompt_ids(ask)
            room = min(ask.max_tokens, limit - len(prompt))
            if room < 1:
                replies.append(Reply(ask.id, "", "prompt_too_long", len(prompt), 0, 0, 0.0))
            else:
                sampling: dict[str, Any] = {"temperature": ask.temperature, "top_p": ask.top_p, "seed": ask.seed}
                requests.append(Request(ask.id, prompt, max_tokens=room, logprobs=ask.logprobs or None, **sampling))
        return requests, replies

    def _make_engine(self, first: "list[Request]", last: bool) -> "Engine":
        """An engine with room for these requests, and, unless they are the `last`, for longer ones behind them.

        The cache is as large as a batch like this needs: pages beyond that would only fall out of the processor's
        caches. Later prompts may be longer, up to the context; then fewer run at once.
        """
        from teacher.engine import Engine

        longest = max(len(request.prompt_ids) + request.max_tokens for request in first)
        # The last few sequences of a stage have the machine to themselves: there the MTP module drafts ahead.
        drafts = 4 if self.model.mtp_layers else 0
        if last:
            engine = Engine(self.model, self.stop_ids, min(self.batch_size, len(first)), longest, speculate=drafts)
        else:
            config = self.model.config
            token_bytes = (config.num_hidden_layers + 1) * config.latent_dim * self.model.lm_head.weight.element_size()
            room = max(config.max_position_embeddings, min(self.batch_size * longest, _CACHE_BYTES // token_bytes))
            engine = Engine(self.model, self.stop_ids, self.batch_size, cache_tokens=room, speculate=drafts)
        self.runs_in = engine.runs_in
        return engine

    def _prompt_ids(self, ask: Ask) -> list[int]:
        # Rendered to text first: the template writes the special tokens, so none may be added again.
        text = self.tokenizer.apply_chat_template(ask.messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _reply(self, done: "Completion") -> Reply:
        ids = done.token_ids
        text = self._decode(ids)
        reasoning = self._reasoning_tokens(text, ids)
        answer = len(ids) - reasoning
        top = None if done.logprobs is None else _top(done.logprobs, ids)
        return Reply(
            done.id, text, done.finish_reason, done.prompt_tokens, reasoning, answer, done.seconds, logprobs=top
        )  # fmt: skip

    def _reasoning_tokens(self, text: str, ids: list[int]) -> int:
        """How many of the tokens it takes to reach the end of the closing tag; all if there is none."""
        close = closing_tag(text)
        if close is None:
            return len(ids)
        # By decoding, not by looking for the tag's id: a model may also spell the tag in several tokens.
        return bisect_left(range(len(ids) + 1), close.end(), key=lambda n: len(self._decode(ids[:n])))

    def _decode(self, ids: list[int]) -> str:
        # Special tokens stay visible: one inside the text is a leak, which the format filter must see.
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _top(positions: "list[TokenLogprobs]", chosen: list[int]) -> TopLogprobs:
    likeliest = [position.top for position in positions]
    tokens = [[token for token, _ in top] for top in likeliest]
    return TopLogprobs(tokens, [[logprob for _, logprob in top] for top in likeliest], chosen)


def _stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The end-of-sequence ids of generation_config.json, else the tokenizer's."""
    from transformers import GenerationConfig

    eos: Any = None
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(f"{folder}: neither generation_config.json nor the tokenizer names an end-of-sequence token")
    return tuple(eos) if isinstance(eos, list) else (eos,)

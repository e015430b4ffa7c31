"""teacher.kind 'embedded': the teacher runs in this process, on our own engine."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.errors import UserError
from distill.files import sha256_file, sha256_json
from distill.records import Ask, Asks, EndpointState, Reply, TopLogprobs
from distill.rendering import ChatTokenizer, load_tokenizer, stop_ids
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
_USUAL_DTYPE = "float32"  # what `teacher.dtype` null means here


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


def open_model(
    model: str,
    dtype: str | None = None,
    device: str = "cpu",
    field: str = "teacher.model",
    experts: Literal["fp8"] | None = None,
    weights: Literal["fp8"] | None = None,
) -> OpenModel:
    """Load a teacher's folder; dtype None: the checkpoint's. Raises ValueError naming what is wrong with it."""
    from teacher import load_model

    folder = teacher_folder(model, field)
    tokenizer = load_tokenizer(str(folder), field=field)
    loaded = load_model(folder, dtype=dtype, device=device, experts=experts, weights=weights)
    if len(tokenizer) > loaded.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {loaded.config.vocab_size}; "
            "they do not belong together"
        )
    return OpenModel(folder, loaded, tokenizer, stop_ids(str(folder), tokenizer))


def identity(teacher: "Teacher") -> dict[str, Any]:
    """What the manifest says of the teacher, found without loading it: "id", "model", "kind" and "licence"."""
    name = teacher_id(teacher.model) + variant(teacher, _USUAL_DTYPE)
    return {"kind": teacher.kind, "model": teacher.model, "id": name, "licence": teacher_licence(teacher.model)}


def variant(teacher: "Teacher", usual_dtype: str | None = None) -> str:
    """What an id says, behind the model's content, of settings that make it write something else: "+think=leave".

    Of `think` only 'leave' does: where the prompt is rendered here, 'force' and 'auto' are the same. `usual_dtype` is
    what dtype null means, where we know it.
    """
    settings = {
        "think": "leave" if teacher.think == "leave" else None,
        "dtype": None if teacher.dtype == usual_dtype else teacher.dtype,
        "experts": teacher.experts,
        "weights": teacher.weights,
    }
    return "".join(f"+{name}={value}" for name, value in settings.items() if value is not None)


class EmbeddedTeacher:
    """A loaded model with its tokenizer and engine; see distill.records.TeacherBackend."""

    def __init__(self, teacher: "Teacher") -> None:
        dtype = teacher.dtype or _USUAL_DTYPE
        opened = open_model(teacher.model, dtype, teacher.device, experts=teacher.experts, weights=teacher.weights)
        self.id = identity(teacher)["id"]
        self.batch_size = teacher.batch_size
        self.model, self.stop_ids = opened.model, opened.stop_ids
        self.chat = ChatTokenizer(teacher.model, think=teacher.think, tokenizer=opened.tokenizer)
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
            prompt = self.chat.ids(ask.messages)
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

    def _reply(self, done: "Completion") -> Reply:
        ids = done.token_ids
        text = self.chat.decode(ids)
        reasoning = self.chat.reasoning_tokens(text, ids)
        return Reply(
            id=done.id,
            text=text,
            finish_reason="empty" if done.finish_reason == "stop" and not text.strip() else done.finish_reason,
            prompt_tokens=done.prompt_tokens,
            reasoning_tokens=reasoning,
            answer_tokens=len(ids) - reasoning,
            seconds=done.seconds,
            logprobs=None if done.logprobs is None else _top(done.logprobs, ids),
        )


def _top(positions: "list[TokenLogprobs]", chosen: list[int]) -> TopLogprobs:
    likeliest = [position.top for position in positions]
    tokens = [[token for token, _ in top] for top in likeliest]
    return TopLogprobs(tokens, [[logprob for _, logprob in top] for top in likeliest], chosen)

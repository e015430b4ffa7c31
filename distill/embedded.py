"""teacher.kind 'embedded': the teacher runs in this process, on our own engine."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.files import sha256_file, sha256_json
from distill.reasoning import closing_tag
from distill.records import Ask, Reply
from distill.shipped import resolve_model

if TYPE_CHECKING:
    from distill.recipe import Teacher
    from teacher.engine import Completion
    from teacher.model import DeepseekV3

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

    def generate(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        """Replies as they finish. A prompt that fills the model's context is answered 'prompt_too_long'."""
        from teacher.engine import Engine, Request

        limit = self.model.config.max_position_embeddings
        requests = []
        for ask in asks:
            prompt = self._prompt_ids(ask)
            room = min(ask.max_tokens, limit - len(prompt))
            if room < 1:
                yield Reply(ask.id, "", "prompt_too_long", len(prompt), 0, 0, 0.0)
            else:
                requests.append(Request(ask.id, prompt, ask.temperature, ask.top_p, max_tokens=room, seed=ask.seed))
        if not requests:
            return
        # The cache holds batch_size × max_len positions, so neither is larger than these asks need.
        longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
        # The last few sequences of a stage have the machine to themselves: there the MTP module drafts ahead.
        drafts = 4 if self.model.mtp_layers else 0
        engine = Engine(self.model, self.stop_ids, min(self.batch_size, len(requests)), longest, speculate=drafts)
        self.runs_in = engine.runs_in
        yield from map(self._reply, engine.generate(requests))

    def _prompt_ids(self, ask: Ask) -> list[int]:
        # Rendered to text first: the template writes the special tokens, so none may be added again.
        text = self.tokenizer.apply_chat_template(ask.messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _reply(self, done: "Completion") -> Reply:
        ids = done.token_ids
        text = self._decode(ids)
        reasoning = self._reasoning_tokens(text, ids)
        answer = len(ids) - reasoning
        return Reply(done.id, text, done.finish_reason, done.prompt_tokens, reasoning, answer, done.seconds)

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

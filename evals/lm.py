"""An lm-eval model that samples through a backend, keeps every answer as it ends, and repeats none.

A backend is whatever turns rendered prompts into text: our transformers decoder (evals.hf), or the teacher, wrapped
by whoever owns it. lm-eval sees one `generate_until` call; between its start and its end each finished sample is
graded and handed to `keep`, so that a kill loses nothing that was reported.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from evals.grading import Grade, grade
from evals.grading.extract import THINK_OPEN
from evals.sampling import seed_of

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Row = dict[str, Any]
FLUSH_SECONDS = 0.5
GRADING_THREADS = 2


@dataclass(frozen=True, slots=True)
class Ask:
    """One sample wanted from a backend. `prompt` is what the backend's own `render` made of the messages."""

    id: str
    prompt: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an Ask. finish_reason other than 'stop' means that the answer is cut off."""

    id: str
    text: str
    finish_reason: str
    tokens: int
    seconds: float


class Backend(Protocol):
    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt for a chat that the model is to go on with."""
        ...

    def generate(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """One Answer for each Ask, as they end. The same Ask gives the same text, whatever else is asked."""
        ...


class Response(str):
    """A generated text with its row, so that a task's process_results need not grade it a second time."""

    row: Row

    @classmethod
    def of(cls, row: Row) -> Response:
        response = cls(row["text"])
        response.row = row
        return response


class SamplingLM(LM):
    """See the module. `done` are rows of earlier attempts by id; `keep` must have them on disk when it returns.

    A row's id is the hash of everything that determines the sample: task, problem, prompt, sample index, sampling
    settings, seed and model revision. `rows` holds all rows of the last call, in the order of the requests.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        model_name: str,
        revision: str,
        seed: int = 0,
        done: Mapping[str, Row] | None = None,
        keep: Callable[[list[Row]], None] = lambda rows: None,
    ) -> None:
        super().__init__()
        self.backend, self.model_name, self.revision, self.seed = backend, model_name, revision, seed
        self._done, self._keep = dict(done or {}), keep
        self.rows: list[Row] = []

    @property
    def tokenizer_name(self) -> str:
        return self.model_name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise ValueError("a task with a gen_prefix cannot be sampled here: the reasoning comes first")
        return self.backend.render(chat_history)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Sample what `done` does not hold. Raises ValueError if the backend leaves a request unanswered."""
        planned = self._plan(requests)
        asks = [ask for ask, _, _ in planned if ask.id not in self._done]
        rows = {ask.id: self._done[ask.id] for ask, _, _ in planned if ask.id in self._done}
        if asks:
            meaning = {ask.id: (row, until) for ask, row, until in planned}
            for row in self._sample(asks, meaning):
                rows[row["id"]] = row
        missing = len(planned) - len(rows)
        if missing:
            raise ValueError(f"{self.model_name}: the backend left {missing} of {len(planned)} samples unanswered")
        self.rows = [rows[ask.id] for ask, _, _ in planned]
        return [Response.of(row) for row in self.rows]

    def _plan(self, requests: list[Instance]) -> list[tuple[Ask, Row, list[str]]]:
        """For each request what to ask, what is known of its row already, and its stop strings.

        lm-eval repeats one Instance k times for k samples; its n-th occurrence is sample n.
        """
        planned, copies = [], Counter[tuple[str | None, int]]()
        for instance in requests:
            prompt, raw_settings = instance.args
            settings = normalize_gen_kwargs(raw_settings, 32768)
            task, doc = instance.task_name, instance.doc
            sample = copies[task, instance.doc_id]
            copies[task, instance.doc_id] += 1
            sampling = {
                "temperature": settings["temperature"],
                "top_p": float(settings.get("top_p", 1.0)),
                "max_tokens": settings["max_gen_toks"],
                "seed": self.seed,
            }
            until = [stop for stop in settings.get("until") or [] if stop]
            known = {
                "model": self.model_name, "task": task, "problem_id": str(doc["id"]), "sample": sample,
                "family": doc.get("family") or "", "revision": self.revision, "sampling": sampling,
            }  # fmt: skip
            identity = json.dumps(
                [task, known["problem_id"], prompt, doc["answer"], doc["kind"], sample, sampling, until, self.revision]
            )
            known["id"] = hashlib.sha256(identity.encode()).hexdigest()[:16]
            ask = Ask(
                known["id"], prompt, sampling["temperature"], sampling["top_p"], sampling["max_tokens"],
                seed_of(self.seed, str(task), known["problem_id"], sample),
            )  # fmt: skip
            thinking = prompt.rstrip().endswith(THINK_OPEN)
            known |= {"_answer": doc["answer"], "_kind": doc["kind"], "_thinking": thinking}
            planned.append((ask, known, until))
        return planned

    def _sample(self, asks: list[Ask], meaning: Mapping[str, tuple[Row, list[str]]]) -> Iterator[Row]:
        """Finished rows, each after `keep` has it. Grading goes on beside the decoding, in order of arrival."""
        grading: deque[tuple[Answer, str, Future[Grade]]] = deque()
        last_flush = time.monotonic()

        def flush(everything: bool) -> list[Row]:
            rows = []
            while grading and (everything or grading[0][2].done()):
                answer, text, future = grading.popleft()
                rows.append(_row(meaning[answer.id][0], answer, text, future.result()))
            if rows:
                self._keep(rows)
            return rows

        with ThreadPoolExecutor(GRADING_THREADS) as graders:
            try:
                for answer in self.backend.generate(asks):
                    known, until = meaning[answer.id]
                    text = postprocess_generated_text(answer.text, until, None) if until else answer.text
                    # Where the prompt opened the thinking, a box counts only once the thinking is closed.
                    whole = f"{THINK_OPEN}\n{text}" if known["_thinking"] else text
                    grading.append((answer, text, graders.submit(grade, whole, known["_answer"], known["_kind"])))
                    if time.monotonic() - last_flush >= FLUSH_SECONDS:
                        yield from flush(everything=False)
                        last_flush = time.monotonic()
            except BaseException:  # Ctrl-C or a failing device: what has ended is kept all the same
                flush(everything=True)
                raise
            yield from flush(everything=True)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise ValueError("this model only samples; a task that needs log-likelihoods cannot be run on it")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise ValueError("this model only samples; a task that needs log-likelihoods cannot be run on it")


def _row(known: Row, answer: Answer, text: str, graded: Grade) -> Row:
    """The line of evals/<model>.jsonl. A cut-off answer is never correct, whatever it happens to contain."""
    truncated = answer.finish_reason != "stop"
    return {key: value for key, value in known.items() if not key.startswith("_")} | {
        "text": text,
        "extracted": graded.extracted,
        "correct": graded.verdict == "correct" and not truncated,
        "verdict": graded.verdict,
        "reason": graded.reason,
        "truncated": truncated,
        "no_answer": graded.extracted is None,
        "tokens": answer.tokens,
        "seconds": round(answer.seconds, 4),
    }

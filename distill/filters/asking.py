"""A recipe's judge, ready to be asked: made once a process, its replies kept in the run's folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from distill.recipe import JudgeModel
from evals.grading.chat import Unreachable
from evals.grading.judge import Judge


def open_judge(settings: JudgeModel, replies: Path | None) -> Judge:
    """The judge of a section `judge`; `replies` is the folder for what it says."""
    assert replies is not None, "a filter that asks needs a folder for the replies"
    return _judge(settings.model_dump_json(), replies)


@lru_cache(maxsize=8)  # it knows how often it was asked in vain
def _judge(settings: str, replies: Path) -> Judge:
    given = JudgeModel.model_validate_json(settings)
    return Judge(
        given.base_url, given.model, replies, n=given.votes, temperature=given.temperature,
        max_tokens=given.max_tokens, seconds=given.seconds, needed=True,
    )  # fmt: skip


@contextmanager
def needing(judge: JudgeModel, field: str) -> Iterator[None]:
    """Turns 'nobody is there' into one sentence that names the recipe's field. Raises ConnectionError."""
    try:
        yield
    except Unreachable as error:
        _judge.cache_clear()  # the next attempt in this process starts anew
        raise ConnectionError(
            f"{field}: '{judge.model}' at {judge.base_url} does not answer ({error}); what it said so far is kept, "
            "start the same command again to go on"
        ) from None

"""Endless plain-text documents as rows of token ids, made by a worker process while the trainer computes.

Documents are a pure function of their index, so that a stream can be taken up at any point: its position is the index
of the next document and the ids of the last one that no row has taken yet. They are laid end to end with
end-of-sequence between, and cut into rows of T+1 ids (inputs, and targets shifted by one), each row starting with the
last id of the one before: every id but the stream's first is predicted once.

Shapes: R rows of a step, T row length.
"""

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from students.child import exit_with_parent

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Documents = Callable[[int], str]
Position = dict[str, Any]  # {"document": int, "rest": list[int]}
START: Position = {"document": 0, "rest": []}
DOCUMENTS_AT_ONCE = 256
STEPS_AHEAD = 8


def read_rows(
    documents: Documents, tokenizer: "Tokenizer", end: int, row_length: int, rows_per_step: int, position: Position
) -> Iterator[tuple[np.ndarray, Position]]:
    """Yield (ids [R, T+1] int32, position after them), endlessly. `end` is the id put after every document."""
    document, rest = position["document"], list(position["rest"])
    size = rows_per_step * row_length + 1
    while True:
        while len(rest) < size:
            texts = [documents(index) for index in range(document, document + DOCUMENTS_AT_ONCE)]
            document += len(texts)
            for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
                rest += encoding.ids
                rest.append(end)
        block = np.asarray(rest[:size], dtype=np.int32)
        rest = rest[size - 1 :]
        starts = np.arange(rows_per_step)[:, None] * row_length
        yield block[starts + np.arange(row_length + 1)], {"document": document, "rest": rest}


def read_rows_ahead(
    documents: Documents, tokenizer: "Tokenizer", end: int, row_length: int, rows_per_step: int, position: Position
) -> Iterator[tuple[np.ndarray, Position]]:
    """read_rows() in a process of its own, a few steps ahead. `documents` must be picklable.

    What the worker raises is raised here. Raises RuntimeError if it is killed.
    """
    context = multiprocessing.get_context("spawn")
    ready: Any = context.Queue(maxsize=STEPS_AHEAD)
    arguments = (ready, documents, tokenizer.to_str(), end, row_length, rows_per_step, position)
    worker = context.Process(target=_work, args=arguments, daemon=True)
    worker.start()
    try:
        while True:
            try:
                item = ready.get(timeout=2)
            except queue.Empty:
                if not worker.is_alive():
                    raise RuntimeError("the process that makes documents was killed") from None
                continue
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        worker.kill()
        worker.join()


def _work(ready: Any, documents: Documents, tokenizer: str, *rest: Any) -> None:
    exit_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are the trainer's
    from tokenizers import Tokenizer  # transformers would take seconds to import here

    try:
        for item in read_rows(documents, Tokenizer.from_str(tokenizer), *rest):
            ready.put(item)
    except Exception as error:
        ready.put(error)
        ready.close()
        ready.join_thread()

"""The teacher's likeliest tokens beside the traces, packed: traces/logprobs.bin.

JSON would spend 290 bytes on a token at K=20, and a server's own answer 1,750; a frame spends about 70: float16
log-probabilities and 32-bit ids as planes of bytes, where the high bytes of small numbers are runs that zstd takes
away.
float16 keeps a log-probability to 1 part in 2,048, so to 0.004 at -8 and better above.

A trace's frame is durable before its line, so every line has its frame. A kill may leave frames without lines at the
end: they are cut when the file is opened to go on, since their samples are asked again. Each frame has a checksum.
docs/formats.md describes the bytes.
"""

import os
import struct
import zlib
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, cast

from distill.errors import UserError
from distill.files import sync_folder
from distill.generation.token_texts import FIRST_ID, TokenTexts, read_texts
from distill.records import Reply, TopLogprobs

if TYPE_CHECKING:
    import numpy as np

NAME = "logprobs.bin"
MISSING = -1  # the id where the teacher gave fewer than K tokens; its log-probability is -inf
_HEADER = struct.Struct("<4sI16sIHHI")  # magic, crc32 of all that follows, trace id, T, K, flags, bytes of payload
_MAGIC = b"TKL1"
_CHOSEN = 1  # flag: the payload has the T tokens that were generated, too
_ABSENT = 2**32 - 1


class Logprobs(NamedTuple):
    """Position t is the t-th token that the teacher generated after the prompt, T in all; K a position.

    Ids are of the teacher's vocabulary, from token_texts.FIRST_ID on of the table of texts. A loss masks MISSING.
    """

    tokens_TK: "np.ndarray"  # int64, likeliest first
    logprobs_TK: "np.ndarray"  # float16, natural logarithms
    chosen_T: "np.ndarray | None"  # int64, the tokens that were generated, where the teacher told them


class LogprobsWriter:
    """Appends frames to `folder`/logprobs.bin. Open it once the finished samples are known, before the first reply.

    A kill may have left frames whose traces are not `finished` (ids of all trace lines, stale ones too): they are cut,
    `cut` counts their bytes.
    """

    def __init__(self, folder: Path, finished: Container[str]) -> None:
        self.path = folder / NAME
        folder.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        self._texts = TokenTexts(folder)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        size = os.fstat(self._handle).st_size
        self._end = _end_of_finished(self._handle, size, finished)
        self.cut = size - self._end
        if self.cut:
            os.ftruncate(self._handle, self._end)
            os.fsync(self._handle)
        if is_new:
            sync_folder(folder)

    def write(self, replies: Iterable[Reply]) -> None:
        """Frames of those replies that have log-probabilities; durable on return. Call it before their lines are
        written, which must be written in the same order.

        Raises OSError (path in `filename`), leaving no half frame; ValueError for what is no table of tokens.
        """
        self._append([(reply.id, reply.logprobs) for reply in replies if reply.logprobs is not None])

    def copy(self, reader: "LogprobsReader", trace_ids: Iterable[str]) -> None:
        """Frames of those traces that `reader` (opened without `token_id`) has, maybe just now; as write()."""
        reader.refresh()
        self._append([(name, reader.top(name)) for name in trace_ids if name in reader])

    def _append(self, tables: list[tuple[str, TopLogprobs]]) -> None:
        if not tables:
            return
        frames = [encode(name, top, self._texts.ids) for name, top in tables]
        self._texts.sync()
        position = self._end
        try:
            for frame in frames:
                written = 0
                while written < len(frame):
                    written += os.pwrite(self._handle, memoryview(frame)[written:], position + written)
                position += written
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, self._end)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._end = position

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            self._texts.close()

    def __enter__(self) -> "LogprobsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LogprobsReader:
    """Frames of a run by trace id. Opening reads the headers alone; a context manager.

    Where two frames have one id, the later one belongs to the trace: the earlier one's line was never written.
    `token_id` finds the id of a token that the teacher gave as text (`ids_of_texts(tokenizer).get`); what it does not
    know keeps its number in the table of texts. Raises UserError if the run has no log-probabilities.
    """

    def __init__(self, run_folder: Path | str, token_id: Callable[[str], int | None] | None = None) -> None:
        self.path = Path(run_folder) / "traces" / NAME
        try:
            self._handle = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file; set sampling.logprobs before traces are made") from None
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._token_id = token_id
        self.refresh()

    def refresh(self) -> None:
        """Find what was written since, if the run is under way."""
        for name, start, end in _frames(self._handle, os.fstat(self._handle).st_size, self._end):
            self._places[name] = start, end
            self._end = end
        self._texts = read_texts(self.path.parent)
        self._known = [self._token_id(text) for text in self._texts] if self._token_id else []

    def __contains__(self, trace_id: str) -> bool:
        return trace_id in self._places

    def __iter__(self) -> Iterator[tuple[str, Logprobs]]:
        """All traces, in the file's order."""
        return ((trace_id, self.read(trace_id)) for trace_id in self._places)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, trace_id: str) -> Logprobs:
        """Raises UserError if the trace has none, or the file's bytes are not those that were written."""
        if trace_id not in self._places:
            raise UserError(f"{self.path}: holds no log-probabilities of trace {trace_id}")
        start, end = self._places[trace_id]
        try:
            found = decode(os.pread(self._handle, end - start, start))
        except ValueError as error:
            raise UserError(f"{self.path}: trace {trace_id}: {error}") from None
        for ids in (found.tokens_TK, found.chosen_T):
            self._translate(ids)
        return found

    def top(self, trace_id: str) -> TopLogprobs:
        """As the teacher gave it, to 16 bits."""
        found = self.read(trace_id)

        def named(ids: list[int]) -> list[int | str]:
            return [self._texts[i - FIRST_ID] if i >= FIRST_ID else i for i in ids if i != MISSING]

        tokens = [named(row) for row in found.tokens_TK.tolist()]
        rows = zip(found.logprobs_TK.tolist(), tokens, strict=True)
        chosen = [] if found.chosen_T is None else named(found.chosen_T.tolist())
        return TopLogprobs(tokens, [row[: len(kept)] for row, kept in rows], chosen)

    def _translate(self, ids: "np.ndarray | None") -> None:
        import numpy as np

        if ids is None or not self._known:
            return
        named = ids >= FIRST_ID
        known = np.array([FIRST_ID + n if token is None else token for n, token in enumerate(self._known)])
        ids[named] = known[ids[named] - FIRST_ID]

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> "LogprobsReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_logprobs(run_folder: Path | str, trace_id: str) -> Logprobs:
    """Of one trace; for many open a LogprobsReader once. Raises UserError as its methods do."""
    with LogprobsReader(run_folder) as reader:
        return reader.read(trace_id)


def _end_of_finished(handle: int, size: int, finished: Container[str]) -> int:
    """Where the last frame of a finished trace ends. They are asked about from the end: few are not finished."""
    starts = array("Q", (start for _, start, _ in _frames(handle, size)))
    for start in reversed(starts):
        name, _, end = next(_frames(handle, size, start))
        if name in finished:
            return end
    return 0


def _frames(handle: int, size: int, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """(trace id, start, end) of every frame from `start` on, up to the first that is not whole."""
    while start + _HEADER.size <= size:
        magic, _, name, *_, length = _HEADER.unpack(os.pread(handle, _HEADER.size, start))
        end = start + _HEADER.size + length
        if magic != _MAGIC or end > size:
            return
        yield name.rstrip(b"\0").decode(errors="replace"), start, end
        start = end


def encode(trace_id: str, top: TopLogprobs, text_ids: Callable[[Sequence[str]], list[int]]) -> bytes:
    """One frame. Rows that are shorter than the longest are filled up. Raises ValueError naming the trace."""
    import numpy as np
    import pyarrow

    name = trace_id.encode()
    if len(name) > 16:
        raise ValueError(f"trace {trace_id}: an id of more than 16 bytes cannot have log-probabilities")
    lengths = {len(row) for row in top.tokens}
    if [len(row) for row in top.tokens] != [len(row) for row in top.logprobs]:
        raise ValueError(f"trace {trace_id}: tokens and log-probabilities differ in shape")
    positions, most = len(top.tokens), max(lengths, default=0)
    tokens, logprobs = top.tokens, top.logprobs
    if len(lengths) > 1:
        tokens = [[*row, *[_ABSENT] * (most - len(row))] for row in tokens]
        logprobs = [[*row, *[-np.inf] * (most - len(row))] for row in logprobs]
    ids = _ids([token for row in tokens for token in row], trace_id, text_ids)
    if chosen := len(top.chosen) > 0:
        if len(top.chosen) != positions:
            raise ValueError(f"trace {trace_id}: {len(top.chosen)} chosen tokens for {positions} positions")
        ids = np.concatenate([ids, _ids(top.chosen, trace_id, text_ids)])
    with np.errstate(over="ignore"):  # servers say -9999, some the lowest float, where others say -inf
        values = np.asarray(logprobs, dtype=np.float32).astype("<f2")
    payload = pyarrow.Codec("zstd", compression_level=1).compress(_planes(ids) + _planes(values), asbytes=True)
    rest = _HEADER.pack(_MAGIC, 0, name, positions, most, _CHOSEN * chosen, len(payload))[8:] + payload
    return _MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest


def decode(frame: bytes) -> Logprobs:
    """Raises ValueError if the frame is not what encode() made."""
    import numpy as np
    import pyarrow

    _, checksum, _, positions, most, flags, _ = _HEADER.unpack_from(frame)
    if zlib.crc32(memoryview(frame)[8:]) != checksum:
        raise ValueError("its bytes are damaged (checksum)")
    cells = positions * most
    wide = cells + (positions if flags & _CHOSEN else 0)
    codec = pyarrow.Codec("zstd")
    data = codec.decompress(frame[_HEADER.size :], decompressed_size=4 * wide + 2 * cells, asbytes=True)
    planes = np.frombuffer(data, np.uint8)
    ids = np.ascontiguousarray(planes[: 4 * wide].reshape(4, wide).T).view("<u4")[:, 0].astype(np.int64)
    ids[ids == _ABSENT] = MISSING
    values = np.ascontiguousarray(planes[4 * wide :].reshape(2, cells).T).view("<f2").reshape(positions, most)
    chosen = ids[cells:] if flags & _CHOSEN else None
    return Logprobs(ids[:cells].reshape(positions, most), values, chosen)


def _ids(tokens: Sequence[int | str], trace_id: str, text_ids: Callable[[Sequence[str]], list[int]]) -> "np.ndarray":
    import numpy as np

    places = [place for place, token in enumerate(tokens) if isinstance(token, str)]
    numbers: list[int | str] = list(tokens)
    for place in places:
        numbers[place] = _ABSENT
    try:
        ids = np.array(numbers, dtype=np.int64)
        if ((ids < 0) | ((ids >= FIRST_ID) & (ids != _ABSENT))).any():
            raise OverflowError
    except (OverflowError, TypeError):
        raise ValueError(f"trace {trace_id}: a token's id is not a whole number from 0 to {FIRST_ID - 1}") from None
    if places:
        ids[places] = text_ids([cast(str, tokens[place]) for place in places])
    return ids.astype("<u4")


def _planes(values: "np.ndarray") -> bytes:
    """All first bytes, then all second bytes, ..."""
    import numpy as np

    return values.reshape(-1).view(np.uint8).reshape(-1, values.itemsize).T.tobytes()

"""Which model a vLLM teacher is, without reading 700 GB of it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.embedded import teacher_licence, variant
from distill.errors import UserError
from distill.files import sha256_file, sha256_json
from distill.recipe import Teacher
from distill.shipped import resolve_model

_SMALL = {".json", ".jinja", ".model", ".txt"}
# Of each file of weights: this many pieces of this many bytes, evenly spread, beside its header and its size.
_PIECES, _PIECE = 16, 64 * 1024


def identity(teacher: Teacher) -> dict[str, Any]:
    """What the manifest says of the teacher: "id", "model", "kind" and "licence". Raises UserError if there is none.

    The id of a folder hashes its configuration and tokenizer in full, and of its weights the size, the header and 1 MiB
    a file, spread over it. Header and size alone would be equal for two checkpoints of one training; with the pieces,
    only an edit of single tensors could go unseen. A model from the hub is the commit that its revision means. Settings
    other than the usual ones that change what it writes follow: see `variant`; here also whose tokenizer, and the
    cache's numbers.
    """
    found = resolve_model(teacher.model)
    if isinstance(found, Path):
        if not found.is_dir():
            raise UserError(f"teacher.model: '{teacher.model}' is neither a folder nor a hub name")
        digest, licence = sha256_json([*_parts(found), teacher.vllm.quantization]), teacher_licence(teacher.model)
        name = f"{found.resolve().name}@{digest[:12]}"
    else:
        commit = _commit(found, teacher.revision)
        licence = None
        name = f"{found}@{commit[:12]}" + (f"+{teacher.vllm.quantization}" if teacher.vllm.quantization else "")
    name += variant(teacher)
    if teacher.vllm.kv_cache_dtype != "auto":
        name += f"+kv_cache_dtype={teacher.vllm.kv_cache_dtype}"
    if teacher.tokenizer not in (None, teacher.model):
        name += f"+tokenizer={teacher.tokenizer}"
    return {"id": name, "model": teacher.model, "kind": teacher.kind, "licence": licence}


def pinned(teacher: Teacher) -> Teacher:
    """With a hub model's revision as the commit that it means now, so that what is loaded is what the id says."""
    found = resolve_model(teacher.model)
    if isinstance(found, Path):
        return teacher
    return teacher.model_copy(update={"revision": _commit(found, teacher.revision)})


def _parts(folder: Path) -> Iterator[list[str | int]]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _SMALL:
            yield [path.name, sha256_file(path)]
        elif path.is_file() and path.suffix == ".safetensors":
            yield [path.name, path.stat().st_size, _sampled(path)]


def _sampled(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if header > size:
            raise UserError(f"{path}: not a safetensors file; its header would be longer than the file")
        digest.update(file.read(header))
        start = 8 + header
        for piece in range(_PIECES):
            file.seek(start + max(size - start - _PIECE, 0) * piece // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _commit(name: str, revision: str | None) -> str:
    """What `revision` (None: the main branch) means now, by the cache's folder that the config lies in."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"teacher.model: '{name}' is neither a folder nor to be had from the hub ({reason})") from None

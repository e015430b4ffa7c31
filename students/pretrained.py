"""Opening a base: its folder checked first, so that each thing that can be wrong has one sentence of its own."""

import hashlib
from pathlib import Path
from typing import Any

from students.export import FACTS

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def check_base(base: str | Path) -> None:
    """Raise ValueError for a folder that lacks a checkpoint's files, without loading any; hub names pass."""
    folder = _check_folder(base)
    if folder is not None:
        _check_tokenizer(folder)
        _check_weights(folder)


def load_tokenizer(base: str | Path) -> Any:
    """The tokenizer of a checkpoint folder or hub name. Raises ValueError if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    folder = _check_folder(base)
    if folder is not None:
        _check_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=False)  # None would ask at the terminal
    except Exception as error:  # the tokenizers library raises bare Exception for a broken tokenizer.json
        raise ValueError(f"{base}: the tokenizer cannot be loaded: {_first_line(error)}") from error


def load_model(base: str | Path, tokenizer: Any = None, dtype: str = "float32") -> Any:
    """A causal language model in `dtype`, from safetensors only; code from a checkpoint is never run.

    Raises ValueError for a folder that is no such checkpoint, and if `tokenizer` can write ids the model has no
    embedding for.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = _check_folder(base)
    if folder is not None:
        _check_weights(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # safetensors and hub errors have no common base class
        raise ValueError(f"{base}: the model cannot be loaded: {_first_line(error)}") from error
    if report["missing_keys"]:  # transformers would make them up at random, with a warning
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{base}: the weights do not fit config.json: {missing[0]} and {len(missing) - 1} more are missing"
        )
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, str(base))
    return model


def check_vocabulary(tokenizer: Any, embeddings: int, name: str) -> None:
    """Raise ValueError if the tokenizer has ids beyond the embedding (a larger embedding is padding, and fine)."""
    size = max(tokenizer.get_vocab().values()) + 1
    if size > embeddings:
        raise ValueError(f"{name}: the tokenizer has {size} tokens, but the model embeds only {embeddings}")


def content_hash(base: str | Path) -> str:
    """sha256 over the files of a checkpoint folder that decide what it computes; of the name itself for a hub name.

    training.json, which says how long it took, decides nothing: killed and resumed, a model stays the same model.
    """
    digest = hashlib.sha256()
    folder = Path(base)
    if not folder.is_dir():
        return hashlib.sha256(str(base).encode()).hexdigest()
    for path in sorted(folder.iterdir()):
        decides = path.suffix in (".safetensors", ".json", ".model", ".jinja", ".txt") and path.name != FACTS
        if path.is_file() and decides:
            digest.update(path.name.encode() + b"\0")
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_folder(base: str | Path) -> Path | None:
    """`base` as a folder, or None if it is a hub name."""
    path = Path(base)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{path}: is a file, expected a checkpoint folder or a hub name")
    if isinstance(base, Path) or path.is_absolute() or str(base).startswith(".") or str(base).count("/") > 1:
        raise ValueError(f"{base}: no such checkpoint folder")
    return None


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder}: no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")


def _check_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so this is not a Hugging Face checkpoint folder")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        found = f"only pickled weights ({', '.join(pickled)}), which can run code" if pickled else "no weights"
        raise ValueError(f"{folder}: found {found}; expected *.safetensors")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

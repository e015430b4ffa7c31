"""Bases that cannot be used: each has one sentence, and none runs code of the checkpoint's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from students.pretrained import content_hash, load_model, load_tokenizer
from tests import tiny


@pytest.fixture
def base(qwen: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen, tmp_path / "base"))


def test_good_base_loads_in_the_type_asked_for(base: Path) -> None:
    assert load_model(base, load_tokenizer(base)).dtype == torch.float32
    assert load_model(base, dtype="bfloat16").dtype == torch.bfloat16


def test_folder_without_tokenizer(base: Path) -> None:
    for path in base.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"base: no tokenizer \(looked for tokenizer.json"):
        load_tokenizer(base)


def test_broken_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="base: the tokenizer cannot be loaded"):
        load_tokenizer(base)


def test_vocabulary_larger_than_the_embedding(base: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match="base: the tokenizer has 264 tokens, but the model embeds only 263"):
        load_model(base, load_tokenizer(base))


def test_pickled_weights_are_refused_unopened(base: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    (base / "model.safetensors").unlink()
    torch.save({"x": Trap()}, base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"base: found only pickled weights \(pytorch_model.bin\), which can run code"):
        load_model(base)
    assert not (tmp_path / "ran").exists()


def test_code_beside_the_weights_is_not_run_and_nobody_is_asked(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless told, transformers asks at the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    automatic = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C", "AutoTokenizer": ["code.C", None]}
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((base / name).read_text())
        fields |= {"model_type": "unheard_of", "tokenizer_class": "Unheard", "auto_map": automatic}
        (base / name).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="base: the model cannot be loaded"):
        load_model(base)
    with pytest.raises(ValueError, match="base: the tokenizer cannot be loaded"):
        load_tokenizer(base)
    assert not (tmp_path / "ran").exists()


def test_folder_without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base: found no weights; expected \*.safetensors"):
        load_model(base)


def test_torn_weights(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="base: the model cannot be loaded"):
        load_model(base)


def test_missing_weights_are_not_made_up(base: Path) -> None:
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ValueError, match=r"base: the weights do not fit config\.json: .*layers\.2"):
        load_model(base)


def test_code_in_a_checkpoint_is_never_run(base: Path, tmp_path: Path) -> None:
    fields = json.loads((base / "config.json").read_text())
    fields |= {"model_type": "odd", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (base / "config.json").write_text(json.dumps(fields))
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="base: the model cannot be loaded"):
        load_model(base)
    assert not (tmp_path / "ran").exists()


def test_no_config_file_instead_of_folder_and_nothing_there(base: Path) -> None:
    with pytest.raises(ValueError, match="is a file, expected a checkpoint folder"):
        load_model(base / "config.json")
    (base / "config.json").unlink()
    with pytest.raises(ValueError, match=r"base: no config\.json"):
        load_model(base)
    with pytest.raises(ValueError, match="nowhere: no such checkpoint folder"):
        load_tokenizer(base / "nowhere")


def test_hash_is_of_the_content(base: Path, qwen: Path) -> None:
    assert content_hash(base) == content_hash(qwen)
    (base / "README.md").write_text("words")
    assert content_hash(base) == content_hash(qwen)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    model.save_pretrained(base)
    assert content_hash(base) != content_hash(qwen)

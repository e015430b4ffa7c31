"""Sizes and types read from the headers of safetensors files, and files that are not whole."""

import json

import pytest
import torch
from safetensors.torch import save_file

from teacher import headers


def test_fp8_files_are_counted_without_their_scales(tmp_path):
    block = {"a.weight": torch.zeros(130, 256).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.zeros(2, 2)}
    save_file(block | {"norm.weight": torch.zeros(256, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    stored = headers.read_headers(tmp_path)
    assert stored.parameters == 130 * 256 + 256
    assert stored.bytes == {"F8_E4M3": 130 * 256, "F32": 16, "BF16": 512}


def test_shards_and_those_that_are_missing(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / headers.INDEX).write_text(json.dumps(index))
    stored = headers.read_headers(tmp_path)
    assert (stored.files, stored.missing, stored.parameters) == (1, ["two.safetensors"], 3)
    save_file({"a": torch.zeros(3)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"two\.safetensors: tensor 'a' is also in one\.safetensors"):
        headers.read_headers(tmp_path)
    assert headers.read_headers(tmp_path / "nothing") is None


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (entry(), 7), (entry(), 9), ([], 0), ({"a": 1}, 0), (entry(dtype="X"), 8), (entry(dtype=4), 8),
        (entry(shape=[3]), 8), (entry(shape=[-2]), 8), (entry(shape="2"), 8), (entry(data_offsets=[8]), 8),
        (entry(data_offsets=[8, 0]), 8), (entry(dtype="F64"), 8),
    ],
)  # fmt: skip
def test_a_file_that_is_not_whole_is_named(header, data, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        headers.read_headers(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, b"version https://git-lfs.github.com/spec/v1\n", b"\x02" + bytes(7) + b"{["]
)
def test_a_file_of_another_kind_is_named(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        headers.read_headers(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": "../x"}}', "[" * 100000])
def test_a_bad_index_is_named(text, tmp_path):
    (tmp_path / headers.INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        headers.read_headers(tmp_path)

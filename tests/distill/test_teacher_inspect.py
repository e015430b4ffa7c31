import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

from distill import teacher_inspect
from distill.errors import UserError
from distill.shipped import configs_folder, resolve_model
from tests.tiny import deepseek_config


def shown(name, width=80, cache_tokens=131072):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    teacher_inspect.run(str(name), cache_tokens, console=console)
    return console.file.getvalue()


def line(text, start):
    (found,) = (row for row in text.splitlines() if row.startswith(start))
    return " ".join(found.split())


def test_deepseek_v3_by_its_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("deepseek-v3", "deepseek-v3.json", "teacher/deepseek-v3"):
        text = shown(name)
        assert "671.0B parameters, 36.63B activated a token; MTP apart, 11.61B\n" in text
    assert line(text, "main model") == "main model 671.0B 100.0% 36.63B 100.0%"
    assert line(text, "FP8") == "FP8, 128×128 scales 626.9 GiB 637.8 GiB 641.3 GiB"
    assert line(text, "MLA latent") == "MLA latent 576 70,272 10.7 GiB 1.0×"
    assert line(text, "MHA") == "MHA, 128 heads 32,768 3,997,696 610.0 GiB 56.9×"
    assert line(text, "GQA") == "GQA, 8 groups 2,048 249,856 38.1 GiB 3.6×"
    assert line(text, "context 4,096").endswith(" 250.5G")
    assert re.fullmatch(r"141 GB H200 16 79\.9 GiB \S+ 8 79\.3 GiB \S+", line(text, "141 GB"))
    assert "By the safetensors headers" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_the_terminal(width):
    lines = shown("deepseek-v3", width).splitlines()[1:]  # the first is the path, which is not broken
    assert max(map(len, lines)) <= width
    if width >= 80:
        assert "…" not in "".join(lines)
        assert sum(row.startswith("192 GB  B200, MI300X ") for row in lines) == 1


def test_a_model_folder_says_what_its_files_hold():
    text = shown("tiny-r1")
    assert line(text, "BF16").startswith("BF16 326 ")
    assert "2,759,824 parameters, as the config asks for" in " ".join(text.split())
    assert "in 1 file " in text


def test_files_that_do_not_fit_the_config_are_told(tmp_path):
    source = resolve_model("tiny-r1")
    shutil.copy(source / "model.safetensors", tmp_path)
    fields = json.loads((source / "config.json").read_text())
    for changes, said in (
        ({"num_nextn_predict_layers": 0}, "They hold 2,759,824 parameters; the config asks for 2,157"),
        ({"num_hidden_layers": 4}, "They hold 2,759,824 parameters; the config asks for "),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | changes))
        assert said in " ".join(shown(tmp_path).split())
    (tmp_path / "model.safetensors").unlink()
    assert "By the safetensors headers" not in shown(tmp_path)


def test_a_download_that_is_not_finished_is_told(tmp_path):
    source = resolve_model("tiny-r1")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, tmp_path)
    index = {"weight_map": {"a": "model.safetensors", "b": "b.safetensors", "c": "c\x1b[31m.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    text = shown(tmp_path)
    assert "2 files of the index not here, the first is b.safetensors." in " ".join(text.split())
    assert "\x1b" not in text


def test_json_is_exact_and_whole(capsys):
    teacher_inspect.run("deepseek-v3", 1000, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == 671_026_419_200
    assert found["parameters"]["activated"] == 36_625_625_600
    assert found["parameters"]["activated_with_embedding"] == 37_552_297_472
    assert sum(kind["total"] for kind in found["parameters"]["by_kind"].values()) == 671_026_419_200
    assert found["parameters"]["mtp"] == {"modules": 1, "total": 11_610_068_224, "activated": 688_100_608}
    assert found["weight_bytes"]["fp8"]["on_disk"] == 688_574_839_360
    assert found["kv_cache"][0]["bytes_per_token"] == 70_272
    assert [row["context"] for row in found["flops_per_token"]] == [4096, 32768, 131072]
    assert len(found["gpus"]["fits"]) == 14 and found["gpus"]["cache_tokens"] == 1000
    assert found["stored"] is None


def test_other_shapes_print_too(tmp_path):
    for changes in (
        {"num_nextn_predict_layers": 0, "n_shared_experts": 0, "first_k_dense_replace": 9},
        {"num_attention_heads": 1, "num_key_value_heads": 1, "num_nextn_predict_layers": 2, "q_lora_rank": None},
        {"max_position_embeddings": 1, "num_hidden_layers": 1},
        {"hidden_size": 10**9, "n_routed_experts": 10**6, "num_hidden_layers": 10**9},
    ):
        deepseek_config(**changes).to_json(tmp_path / "config.json")
        assert "main model" in shown(tmp_path / "config.json")
    assert line(shown(tmp_path), "24 GB").endswith("none none")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (9999, "9,999"), (10_000, "10.00K"), (671_026_419_200, "671.0B"), (10**15, "1,000.0T")],
)
def test_numbers(value, text):
    assert teacher_inspect.number(value) == text


def test_sizes():
    assert [teacher_inspect.size(n) for n in (0, 1023, 1024, 2**30 - 1, 2**40)] == [
        "0 B", "1,023 B", "1.0 KiB", "1,024.0 MiB", "1,024.0 GiB",
    ]  # fmt: skip


def test_bad_names_and_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "quantization_config": {"quant_method": "x"}}')
    for name, said in (
        ("deepseek-ai/DeepSeek-V3", "no such config.json or model folder; shipped are deepseek-v3, tiny-r1"),
        ("../teacher/deepseek-v3", "no such config.json or model folder"),
        (str(tmp_path / "model.safetensors"), "expected a config.json or a model folder, found a .safetensors file"),
        (str(configs_folder() / "teacher" / "tiny-r1.yaml"), "found a .yaml file"),
        (str(tmp_path), "quantization_config is .*; expected quant_method 'fp8'"),
    ):
        with pytest.raises(UserError, match=re.escape(name) + ".*" + said):
            teacher_inspect.examine(name, 1)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        teacher_inspect.examine(str(tmp_path), 1)


def command(*arguments, **options):
    code = "import sys; from distill.__main__ import main; sys.argv[0] = 'distill'\ntry:\n    main()\nfinally:\n"
    code += "    print('torch' in sys.modules, file=sys.stderr)"
    return subprocess.run(
        [sys.executable, "-c", code, "teacher", "inspect", *arguments], capture_output=True, text=True, **options
    )


def test_the_command_loads_no_torch():
    result = command("deepseek-v3", "--cache-tokens", "1000", env={**os.environ, "COLUMNS": "80"})
    assert (result.returncode, result.stderr) == (0, "False\n")
    assert "70,272" in result.stdout and "1,000 tokens of bf16 cache" in result.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such config.json or model folder"),
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"model_type": "qwen2"}', "model_type is 'qwen2'; expected 'deepseek_v3'"),
        ('{"model_type": "deepseek_v3", "hidden_size": "7168"}', "hidden_size is '7168'; expected a positive integer"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(content, said, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    result = command(str(path))
    assert result.returncode == 2 and result.stdout == ""
    first, _, rest = result.stderr.partition("\n")
    assert first.startswith("distill: ") and said in first and rest == "False\n"

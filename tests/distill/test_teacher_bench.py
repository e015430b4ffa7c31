"""`distill teacher bench` hands its options to the bench of the source tree, and its exit status back."""

import subprocess
from types import SimpleNamespace

from typer.testing import CliRunner

from distill import teacher_bench
from distill.cli import app


def test_options_and_exit_status_pass_through(monkeypatch, tmp_path):
    ran = []

    def run(command, cwd):
        ran.append((command, cwd))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    result = CliRunner().invoke(app, ["teacher", "bench", "--quick", "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 1
    command, root = ran[0]
    assert command[1:] == ["-m", "tests.bench.kernels", "--quick", "--json", str(tmp_path / "a.json")]
    assert (root / "tests" / "bench" / "kernels.py").is_file()


def test_an_installed_package_has_no_bench(monkeypatch, tmp_path):
    monkeypatch.setattr(teacher_bench.distill, "__file__", str(tmp_path / "distill" / "__init__.py"))
    result = CliRunner().invoke(app, ["teacher", "bench"])
    assert result.exit_code != 0 and "source tree" in str(result.exception)

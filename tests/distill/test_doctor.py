import io
from pathlib import Path

from rich.console import Console

from distill import doctor
from distill.doctor import GIB, Machine, verdicts

GOOD = [("torch", ">=2", "2.13.0", True)]
H100 = ("NVIDIA H100 80GB HBM3", 79 * GIB)


def missing(machine, packages=GOOD):
    return dict(verdicts(machine, packages))


def test_every_section_is_printed():
    out = io.StringIO()
    doctor.run(Console(file=out, width=140))
    for word in ("machine", "engines", "packages", "sizes", "torch", "quickstart", "one GPU", "cluster", "embedded"):
        assert word in out.getvalue()


def test_the_requirements_of_this_installation_fit():
    rows = doctor.package_rows()
    assert {"torch", "transformers", "lm-eval"} <= {name for name, *_ in rows}
    assert [name for name, _, _, fits in rows if not fits] == []


def test_a_laptop_runs_the_quickstart_but_for_the_models(monkeypatch, tmp_path):
    laptop = Machine(2, 8 * GIB, 50 * GIB, 2, [])
    monkeypatch.setattr(doctor, "resolve_model", lambda name: tmp_path)
    assert missing(laptop)["quickstart"] == [f"shipped model {name}" for name in doctor.SHIPPED_MODELS]
    (tmp_path / "config.json").write_text("{}")
    assert missing(laptop)["quickstart"] == []
    assert "a CUDA GPU of 80 GB" in missing(laptop)["one GPU"]
    assert "8 CUDA GPUs (has 0) or several such nodes" in missing(laptop)["cluster"]


def test_small_memory_and_disk_are_told_with_what_is_there():
    lines = missing(Machine(2, 2 * GIB, GIB // 2, 2, []))["quickstart"]
    assert "3.0 GiB of memory (has 2.0 GiB)" in lines
    assert "1.0 GiB of free disk here (has 0.5 GiB)" in lines


def test_it_says_what_shuts_programs_in(monkeypatch):
    from evals.grading import sandbox

    for kind, said in (("bubblewrap", "bubblewrap"), ("namespaces", "without bubblewrap"), ("limits-only", "limits")):
        monkeypatch.setattr(sandbox, "choose", lambda kind=kind: kind)
        assert said in doctor.sandbox_state()
    monkeypatch.undo()
    monkeypatch.delenv("DISTILL_SANDBOX", raising=False)
    monkeypatch.setattr(sandbox, "why_not", lambda kind: "no")
    assert "none, programs are not graded" in doctor.sandbox_state() and "bubblewrap: no" in doctor.sandbox_state()
    monkeypatch.setenv("DISTILL_SANDBOX", "wishes")
    assert "unknown isolation 'wishes'" in doctor.sandbox_state()


def test_gpus_count():
    assert not any("GPU" in line for line in missing(Machine(16, 128 * GIB, 99 * GIB, 16, [H100]))["one GPU"])
    assert not any("GPU" in line for line in missing(Machine(16, 128 * GIB, 99 * GIB, 16, [H100] * 8))["cluster"])


def test_a_wrong_package_is_missing_everywhere():
    wrong = [("torch", "<2.14", "3.0", False), ("peft", ">=0.19", "", False)]
    for lines in missing(Machine(2, 8 * GIB, 50 * GIB, 2, [H100] * 8), wrong).values():
        assert "package torch <2.14 (installed: 3.0)" in lines
        assert "package peft >=0.19 (installed: none)" in lines


def test_it_says_whether_the_engine_runs_in_c(monkeypatch):
    laptop = Machine(2, 8 * GIB, 50 * GIB, 2, [])
    monkeypatch.setattr("teacher.native.build.obstacle", lambda: None)
    assert doctor.embedded_state(laptop) == "ready"
    monkeypatch.setattr("teacher.native.build.obstacle", lambda: "no C compiler (cc)")
    assert doctor.embedded_state(laptop) == "ready, on CPUs in torch alone (slower): no C compiler (cc)"
    assert doctor.embedded_state(Machine(2, None, GIB, None, [])) == "torch does not load"


def test_it_says_whether_kernels_in_cuda_are_compiled(monkeypatch):
    hopper = Machine(16, 128 * GIB, 99 * GIB, 16, [H100])
    assert doctor.cuda_state(Machine(2, None, GIB, 2, [])) == "not used: see the line above"
    monkeypatch.setattr(doctor, "kernels_state", lambda machine: "ready")
    monkeypatch.setattr("teacher.kernels.cuda.build.nvcc", lambda: "/opt/bin/nvcc")
    assert doctor.cuda_state(hopper) == "ready, compiled by /opt/bin/nvcc"
    monkeypatch.setenv("DISTILL_CUDA", "0")
    assert doctor.cuda_state(hopper) == "not used, Triton's instead: DISTILL_CUDA is 0"


def test_vllm_in_an_environment_of_its_own_is_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.serving.interpreter._BUILT", Path("made/bin/python"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    big = Machine(64, 512 * GIB, 500 * GIB, 64, [H100] * 8)
    assert doctor.vllm_found() is None and missing(big)["one GPU"] == ["vLLM: pip install 'distill[vllm]'"]
    (tmp_path / "made" / "bin").mkdir(parents=True)
    (tmp_path / "made" / "bin" / "python").touch()
    assert doctor.vllm_found() == f"in {tmp_path / 'made'}" and missing(big)["one GPU"] == missing(big)["cluster"] == []

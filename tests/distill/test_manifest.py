import platform
import subprocess

from distill.manifest import Manifest, environment, git_commit, peak_rss_bytes


def test_update_is_on_the_disk_at_once(tmp_path):
    manifest = Manifest(tmp_path / "manifest.json")
    assert manifest.data == {"stages": {}}
    manifest.update(teacher={"name": "tiny-r1"})
    manifest.stage("traces")["status"] = "running"
    manifest.save()
    again = Manifest(tmp_path / "manifest.json")
    assert again.data == {"stages": {"traces": {"status": "running"}}, "teacher": {"name": "tiny-r1"}}


def test_environment_names_versions_and_machine():
    facts = environment()
    assert facts["python"] == platform.python_version()
    assert facts["cpus"] >= 1
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["packages"]["lm-eval"] == "0.4.13"


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_commit_of_a_checkout(tmp_path):
    assert git_commit(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "v1")
    commit = git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_peak_memory_is_in_bytes():
    # Above a Python with pytest loaded, below any machine: kilobytes or pages would fall outside.
    assert 20e6 < peak_rss_bytes() < 1e12

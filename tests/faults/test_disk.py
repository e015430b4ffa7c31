"""Disks that are full, read-only or somebody else's: one sentence, an exit code, nothing torn, and on it goes after."""

import os
import subprocess

import pytest

from tests.faults.running import FaultServer, Run, check_against_log, check_complete, whole_rows

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and changing user need root")


def one_sentence(status, said, *words):
    assert status not in (0, None) and status > 0, f"{status}: {said}"
    assert "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("distill: ")
    assert all(word in last for word in words), last


def nothing_torn(run):
    """Whole lines, up to the last byte."""
    data = run.traces.read_bytes() if run.traces.exists() else b""
    assert not data or data.endswith(b"\n")
    return whole_rows(run.traces)


@pytest.fixture
def small_disk(tmp_path):
    """Where to mount, and a function that mounts a tmpfs of some size there, or another size on a second call."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(size):
        option = f"{'remount,' if mounted else ''}size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
        mounted.append(size)

    yield place, mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@as_root
def test_a_full_disk_stops_the_run_and_a_larger_one_lets_it_go_on(zygote, tmp_path, small_disk):
    place, mount = small_disk
    mount("300k")
    with FaultServer(tmp_path / "log") as server:
        run = Run(place, [server], problems=150, samples=2)
        status, said = zygote.run(run.argv())
        one_sentence(status, said, "no space left on device", "resumes")
        kept = nothing_torn(run)
        assert kept, "the disk was full before the first sample"
        mount("20m")
        assert zygote.run(run.argv())[0] == 0
        rows = check_complete(run)
        assert rows[: len(kept)] == kept
        check_against_log(rows, run.events(), restarted=True)


def test_a_limit_on_file_size_stops_the_run_as_a_full_disk_does(zygote, tmp_path):
    with FaultServer(tmp_path / "log") as server:
        run = Run(tmp_path, [server], problems=150, samples=2)
        status, said = zygote.run(run.argv(), file_size=200_000)
        one_sentence(status, said, "File too large", "traces.jsonl")
        kept = nothing_torn(run)
        assert kept
        assert zygote.run(run.argv())[0] == 0
        assert check_complete(run)[: len(kept)] == kept


def prepared(zygote, tmp_path, server):
    """A run folder in which a few samples are finished."""
    run = Run(tmp_path, [server], problems=10)
    assert zygote.run(run.argv())[0] == 0
    return Run(tmp_path, [server], problems=10, samples=3)


@as_root
@pytest.mark.parametrize("what", ["folder", "traces", "file"])
def test_without_the_right_to_write_nothing_is_asked(what, zygote, tmp_path):
    with FaultServer(tmp_path / "log") as server:
        run = prepared(zygote, tmp_path, server)
        place = {"folder": run.folder, "traces": run.traces.parent, "file": run.traces}[what]
        for path in (tmp_path, *tmp_path.parents):
            if not path.stat().st_mode & 0o001:  # pytest's own folders: three, in a worker of pytest-xdist four
                path.chmod(0o755)
        for path in [run.folder, *run.folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
        os.chown(place, 0, 0)
        before, asked = run.traces.read_bytes(), len(run.events())
        status, said = zygote.run(run.argv(), uid=NOBODY)
        one_sentence(status, said, "Permission denied", str(run.folder))
        assert run.traces.read_bytes() == before
        assert len(run.events()) == asked, "requests were made whose answers could not be kept"
        assert zygote.run(run.argv())[0] == 0
        check_complete(run)


@as_root
def test_a_read_only_disk_is_told_before_anything_is_asked(zygote, tmp_path, small_disk):
    place, mount = small_disk
    mount("20m")
    with FaultServer(tmp_path / "log") as server:
        run = prepared(zygote, place, server)
        asked = len(run.events())
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        status, said = zygote.run(run.argv())
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        one_sentence(status, said, "Read-only file system", str(run.folder))
        assert len(run.events()) == asked
        assert zygote.run(run.argv())[0] == 0
        check_complete(run)

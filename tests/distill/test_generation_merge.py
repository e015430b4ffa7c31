"""Shards: each in its own folder, together exactly the plan; merged once, twice, half-way and while they work."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distill import problems, traces
from distill.errors import UserError
from distill.generation.logprobs import LogprobsReader
from distill.generation.merge import merge, shard_folder
from distill.records import TopLogprobs
from distill.runfolder import RunFolder
from tests.distill.small_run import FakeTeacher, install, make_recipe, right_reply

ROOT = Path(__file__).resolve().parents[2]


def generate(folder, monkeypatch, recipe, shard=None, identity="fake@000000000000"):
    with RunFolder.open(folder, recipe, shard) as run:
        run.begin("problems", "x")
        run.finish("problems", **problems.run(recipe, run))
        right = right_reply(problems.read_problems(run.path("problems.jsonl")))
        teacher = install(monkeypatch, FakeTeacher(right, identity))
        run.begin("traces", "x")
        facts = traces.run(recipe, run)
        run.finish("traces", **facts)
    return facts, teacher


def ids(folder):
    return [json.loads(line)["id"] for line in (folder / "traces" / "traces.jsonl").read_bytes().splitlines()]


@pytest.fixture
def shards(tmp_path, monkeypatch):
    folders = []
    for n in (1, 2, 3):
        folders.append(shard_folder(tmp_path / "run", (n, 3)))
        generate(folders[-1], monkeypatch, make_recipe(), (n, 3))
    return folders


def test_the_shards_are_the_plan_and_merge_into_a_run(tmp_path, monkeypatch, shards):
    assert [folder.name for folder in shards] == [f"run.shard-{n}-of-3" for n in (1, 2, 3)]
    whole = tmp_path / "whole"
    generate(whole, monkeypatch, make_recipe())
    parts = [ids(folder) for folder in shards]
    assert sorted([name for part in parts for name in part]) == sorted(ids(whole)) and all(parts)
    said = merge(tmp_path / "run", shards)
    assert said.startswith(f"{tmp_path / 'run'}: 24 traces added from 3 folders, 0 were there")
    assert ids(tmp_path / "run") == [name for part in parts for name in part]
    facts, teacher = generate(tmp_path / "run", monkeypatch, make_recipe())
    assert (facts["made"], facts["traces"], teacher.asked) == (0, 24, [])
    assert (tmp_path / "run" / "traces" / "traces.parquet").is_file()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["stages"]["problems"]["status"] == "done" and manifest["teacher"]["id"] == "fake@000000000000"


def test_merging_again_adds_nothing_and_a_killed_merge_goes_on(tmp_path, shards):
    out = tmp_path / "run"
    merge(out, shards)
    expected = ids(out)
    assert "0 traces added from 3 folders, 24 were there" in merge(out, shards)
    path = out / "traces" / "traces.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    assert "19 traces added" in merge(out, shards) and ids(out) == expected


def test_lines_that_are_being_written_and_repeated_ones_are_left_out(tmp_path, shards):
    path = shards[0] / "traces" / "traces.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + lines[0] + lines[1][:30])
    before = path.read_bytes()
    assert f"{len(lines)} traces added from 1 folder, 1 were there" in merge(tmp_path / "run", shards[:1])
    assert path.read_bytes() == before, "a run that is merged from is not written to"


@pytest.mark.parametrize(
    ("sections", "identity", "message"),
    [
        ({"sampling": {"temperature": 0.7}}, "fake@000000000000", r"b: sampling.temperature is 0.7, but 0.6 in"),
        ({"seed": 3}, "fake@000000000000", r"b: seed is 3, but 0 in"),
        ({}, "other@1", r"b: teacher is 'other@1', but 'fake@000000000000' in"),
        ({"problems": {"count": 11}}, "fake@000000000000", r"b: problems.jsonl is '\w+', but '\w+' in"),
    ],
)  # fmt: skip
def test_runs_that_asked_for_something_else_are_refused(tmp_path, monkeypatch, shards, sections, identity, message):
    generate(tmp_path / "b", monkeypatch, make_recipe(**sections), identity=identity)
    with pytest.raises(
        UserError, match=message + r".*; only runs that ask the same teacher for the same can be merged"
    ):
        merge(tmp_path / "run", [*shards, tmp_path / "b"])
    assert not (tmp_path / "run").exists()


def test_more_samples_and_adaptive_sampling_are_no_other_recipe(tmp_path, monkeypatch, shards):
    more = make_recipe(sampling={"samples": 3, "adaptive": {"most": 4}})
    generate(tmp_path / "more", monkeypatch, more)
    assert "12 traces added from 1 folder, 24 were there" in merge(merged(tmp_path, shards), [tmp_path / "more"])
    assert (tmp_path / "run" / "traces" / "grades.jsonl").read_bytes().count(b"\n") == 36


def merged(tmp_path, shards):
    merge(tmp_path / "run", shards)
    return tmp_path / "run"


class WithLogprobs(FakeTeacher):
    """Two likeliest tokens at each of some positions, told by their text and made from the ask's seed."""

    def generate(self, asks):
        seeds = {}
        for batch in super().generate(asks):
            seeds |= {ask.id: ask.seed for ask in self.asked}
            yield [replace(reply, logprobs=likeliest(seeds[reply.id])) for reply in batch]


def likeliest(seed):
    rows = range(1 + seed % 5)
    return TopLogprobs(
        [[f"a{seed % 7}", f"b{n}"] for n in rows], [[-0.25, -1.5 - n] for n in rows], [f"b{n}" for n in rows]
    )


def test_log_probabilities_come_along(tmp_path, monkeypatch):
    """Each shard has a table of token texts of its own; a merge that was killed leaves frames without lines."""
    recipe = make_recipe(sampling={"logprobs": 2})
    monkeypatch.setattr(f"{__name__}.FakeTeacher", WithLogprobs)
    shards = [shard_folder(tmp_path / "run", (n, 2)) for n in (1, 2)]
    for n, folder in enumerate(shards, start=1):
        generate(folder, monkeypatch, recipe, (n, 2))
    out = tmp_path / "run"
    merge(out, shards[:1])
    merge(out, shards)
    expected = (out / "traces" / "logprobs.bin").read_bytes()
    lines = (out / "traces" / "traces.jsonl").read_bytes().splitlines(keepends=True)
    (out / "traces" / "traces.jsonl").write_bytes(b"".join(lines[:-4]))
    assert "4 traces added" in merge(out, shards)
    assert (out / "traces" / "logprobs.bin").read_bytes() == expected
    rows = [json.loads(line) for line in lines]
    with LogprobsReader(out) as reader:
        assert len(reader) == len(rows) == 24
        for row in rows:
            assert reader.top(row["id"]) == likeliest(row["sampling"]["seed"])


def test_folders_that_cannot_be_merged(tmp_path, shards):
    with pytest.raises(UserError, match=r"cannot be filled from itself; name another folder first"):
        merge(shards[0], shards)
    with pytest.raises(UserError, match=r"nowhere: has no traces/traces.jsonl; expected a run folder to merge from"):
        merge(tmp_path / "run", [shards[0], tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"is a shard itself; merge into a folder of its own"):
        merge(shards[0], shards[1:])


def test_a_shard_stays_what_it_is(shards):
    with pytest.raises(UserError, match=r"is for shard 1/3, not for shard 2/3; each shard has its own folder"):
        RunFolder.open(shards[0], make_recipe(), (2, 3))
    with RunFolder.open(shards[0], make_recipe()) as run:
        assert run.shard == (1, 3)


def test_a_whole_run_does_not_become_a_shard(tmp_path, monkeypatch):
    generate(tmp_path, monkeypatch, make_recipe())
    with pytest.raises(UserError, match="is for the whole plan, not for shard 1/2"):
        RunFolder.open(tmp_path, make_recipe(), (1, 2))


def test_shards_and_merge_from_the_command_line(tmp_path):
    """With the shipped teacher, tiny as the recipe is."""
    small = ["problems.count=6", "sampling.samples=1", "sampling.max_tokens=8", "evals.problems.count=2"]

    def distill(*arguments, code=0):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "distill", "traces", *arguments],
            capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    distill("quickstart", *small, "--shard", "1/2")
    shard = "runs/quickstart.shard-1-of-2"
    some = len(ids(tmp_path / shard))
    assert 0 < some < 6
    assert f"{some} traces added from 1 folder" in distill("merge", "runs/quickstart", shard)
    assert "problems  already done, skipped" in distill("runs/quickstart")
    assert len(set(ids(tmp_path / "runs" / "quickstart"))) == 6
    assert "expected `distill traces merge OUT RUN...`" in distill("merge", "runs/quickstart", code=2)
    assert "--shard 3/2: expected I/N" in distill("quickstart", "--shard", "3/2", code=2)

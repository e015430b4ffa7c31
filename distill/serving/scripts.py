"""Launch scripts for Slurm and for plain ssh: one node by itself, several as a Ray cluster with vLLM on top.

Written out as bash, because that is what people put under their own scheduler's rules and read before they run it. A
script waits until Ray has all GPUs, runs vLLM on the first node, and where vLLM or a node's Ray ends, takes all of it
down and starts anew, a bounded number of times; at its own end it leaves nothing running on any node.
"""

import shlex
from typing import Literal

from distill.serving.command import Plan

_HEAD = """\
#!/usr/bin/env bash
{header}
set -euo pipefail

# A file to source on every node, such as /shared/venv/bin/activate.
ENVIRONMENT=${{ENVIRONMENT:-}}
# Of the server, on the first node.
PORT={port}
# How often all of it is started again before the script gives up.
RESTARTS=${{RESTARTS:-5}}
# Seconds until the server must answer; weights take their time.
START_SECONDS=${{START_SECONDS:-7200}}
{ray_settings}
say() {{ echo "$(date +%T) $*" >&2; }}
"""

_SLURM_HEADER = """\
# {title}
# Submit with: sbatch SCRIPT. VLLM_API_KEY in the environment asks clients for a key.
#SBATCH --job-name=teacher
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=teacher-%j.log
#SBATCH --requeue"""

_SSH_HEADER = """\
# {title}
# Run on the first node, or on any machine that reaches all by ssh without a password: {usage}
# Every node needs the same environment and the model under the same path or in its cache. ssh carries no environment
# over, so a key goes into the file ENVIRONMENT (export VLLM_API_KEY=...), which only you should be able to read."""

_RAY_SETTINGS = """\
RAY_PORT=${RAY_PORT:-6379}
# Seconds until all nodes must have joined.
RAY_SECONDS=${RAY_SECONDS:-300}
"""

_SLURM_NODES = """
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# on NODE COMMAND: in a subshell, which it becomes, so that killing that ends the command there
on() {
    exec srun --nodes=1 --ntasks=1 --nodelist="$1" --overlap --kill-on-bad-exit=1 bash -c "$(prepared "$2")"
}
"""

_SSH_NODES = """
[ "$#" -eq {nodes} ] || {{ echo "usage: $0 {names}" >&2; exit 2; }}
NODES=("$@")
# on NODE COMMAND: in a subshell, which it becomes; -tt, so that the command there ends with the connection
on() {{
    exec ssh -tt -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 "$1" \\
        "bash -c $(printf %q "$(prepared "$2")")" < /dev/null
}}
"""

_COMMON = """\
prepared() { echo "${ENVIRONMENT:+. $(printf %q "$ENVIRONMENT"); }$1"; }
HEAD=${NODES[0]}
SERVE=$(cat <<'COMMAND'
@COMMAND@
COMMAND
)

running=()
down() {
    local pid
    for pid in "${running[@]}"; do kill "$pid" 2> /dev/null || true; done
@STOP@    wait
    running=()
}
trap down EXIT
trap 'say "ended from outside"; exit 143' TERM INT

answers() { curl --silent --fail --max-time 5 --output /dev/null "http://$HEAD:$PORT/health"; }
# until_answers PID...: waits for the server, and fails if one of these processes ends first
until_answers() {
    local end=$((SECONDS + START_SECONDS))
    until answers; do
        all_alive "$@" || return 1
        [ "$SECONDS" -lt "$end" ] || { say "no answer in $START_SECONDS s"; return 1; }
        sleep 5
    done
}
all_alive() {
    local pid
    for pid in "$@"; do kill -0 "$pid" 2> /dev/null || return 1; done
}
"""

_STOP_RAY = """\
    local node
    for node in "${NODES[@]}"; do on "$node" "ray stop --force" > /dev/null 2>&1 & done
"""

_RAY = """
# The cluster: returns once Ray counts all GPUs.
up() {
    local node address end
    address=$(on "$HEAD" "hostname -I" | tr -d '\\r' | awk '{print $1}')
    [ -n "$address" ] || { say "$HEAD does not answer"; return 1; }
    # --block: the connection lives as long as the node's Ray does, so the loss of either is seen here.
    on "$HEAD" "ray start --head --block --disable-usage-stats --node-ip-address=$address --port=$RAY_PORT" &
    running+=($!)
    for node in "${NODES[@]:1}"; do
        on "$node" "ray start --block --disable-usage-stats --address=$address:$RAY_PORT" &
        running+=($!)
    done
    end=$((SECONDS + RAY_SECONDS))
    until on "$HEAD" "RAY_ADDRESS=$address:$RAY_PORT ray status" 2> /dev/null | grep -q "/@GPUS@\\.0 GPU"; do
        all_alive "${running[@]}" || { say "Ray did not start on every node"; return 1; }
        [ "$SECONDS" -lt "$end" ] || { say "no @GPUS@ GPUs in Ray after $RAY_SECONDS s"; return 1; }
        sleep 5
    done
    SERVE_THERE="export RAY_ADDRESS=$address:$RAY_PORT VLLM_HOST_IP=$address; $SERVE"
}
"""

_ALONE = """
up() { SERVE_THERE=$SERVE; }
"""

_LOOP = """
for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
    if [ "$attempt" -gt 0 ]; then
        down
        say "restart $attempt of $RESTARTS in $((attempt * 10)) s"
        sleep $((attempt * 10))
    fi
    up || continue
    on "$HEAD" "$SERVE_THERE" &
    running+=($!)
    until_answers "${running[@]}" || continue
    say "ready: http://$HEAD:$PORT/v1"
    # Ends with the first of them: the server, or a node's Ray, which takes the server down anyway.
    wait -n "${running[@]}" || true
    say "the server or a node was lost"
done
say "given up after $RESTARTS restarts"
exit 1
"""


def script(plan: Plan, kind: Literal["slurm", "ssh"]) -> str:
    """The script's text, for bash 4.4 or newer."""
    ray = plan.nodes > 1
    title = f"{plan.arguments[0]} on {plan.nodes} × {plan.node_gpus} GPUs: " + ", ".join(
        f"{name} parallel {size}"
        for name, size in (("tensor", plan.at.tensor), ("pipeline", plan.at.pipeline), ("data", plan.at.data))
        if size > 1
    )
    title += ", expert parallel" if plan.at.expert else ""
    names = " ".join(f"NODE{n + 1}" for n in range(plan.nodes))
    if kind == "slurm":
        header = _SLURM_HEADER.format(title=title, nodes=plan.nodes, gpus=plan.node_gpus)
        nodes = _SLURM_NODES
    else:
        header = _SSH_HEADER.format(title=title, usage=f"bash SCRIPT {names}")
        nodes = _SSH_NODES.format(nodes=plan.nodes, names=names)
    gpus = str(plan.nodes * plan.node_gpus)
    common = _COMMON.replace("@COMMAND@", plan.text()).replace("@STOP@", _STOP_RAY if ray else "")
    head = _HEAD.format(header=header, port=shlex.quote(str(plan.port)), ray_settings=_RAY_SETTINGS if ray else "")
    return head + nodes + common + (_RAY.replace("@GPUS@", gpus) if ray else _ALONE) + _LOOP

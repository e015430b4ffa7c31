#!/usr/bin/env bash
# The peers of tests/bench/traces.py, each in an environment of its own (about a minute each): tests/bench/traces_env.sh FOLDER [PYTHON]
# Then: python -m tests.bench.traces --peers FOLDER
set -euo pipefail
folder=${1:?usage: tests/bench/traces_env.sh FOLDER [PYTHON]}
python=${2:-python3}
make() { # NAME PACKAGE...: an environment in $folder/NAME, unless it is there
    local name=$1
    shift
    if [ ! -e "$folder/$name/.installed" ]; then
        "$python" -m venv "$folder/$name"
        "$folder/$name/bin/python" -m pip --disable-pip-version-check install --quiet "$@"
        touch "$folder/$name/.installed"
    fi
}
make curator 'bespokelabs-curator==0.1.31'
# distilabel imports requests and beautifulsoup4, and does not ask for them.
make distilabel 'distilabel[openai]==1.5.3' requests beautifulsoup4
# What open-r1's generation script imports; the loop itself is in traces_children.py.
make open-r1 aiohttp aiofiles tqdm uvloop

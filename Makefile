# make demo        environment in .venv, then the whole pipeline on this machine's CPU; says where the report is
# make test        the same environment with the test tools; the whole suite, in WORKERS=2 processes
# make check       ruff and mypy
# make demo-short  the demo's recipe with fewer problems, samples and steps, for CI
# make vllm        vLLM's CPU build in an environment of its own, .vllm (3.5 GB): teacher.kind vllm, `distill teacher
#                  serve --engine vllm`, and a peer in tests/bench; `pytest -m vllm` tests them with it
# Each is quick the second time. PYTHON=python3.12 picks another interpreter, CONSTRAINTS= lifts the exact pins.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: demo demo-short test check vllm clean

demo: $(VENV)/.installed
	$(VENV)/bin/distill run configs/quickstart.yaml

demo-short: $(VENV)/.installed
	$(VENV)/bin/distill run configs/quickstart.yaml name=quickstart-short \
		problems.count=120 sampling.samples=1 students.0.epochs=0.5 students.1.epochs=0.5 \
		evals.problems.count=42 evals.samples=2 evals.bootstrap=500

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

check: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "distill needs Python 3.11 or newer, and '$(PYTHON)' is not: name one with make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
		echo "'$(PYTHON)' cannot make environments: install its venv package (python3-venv on Debian and Ubuntu)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time takes some minutes"
	$(PIP) --quiet -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --quiet -e '.[test]'
	@touch $@

vllm:
	tests/bench/vllm_env.sh .vllm $(PYTHON)

clean:
	rm -rf $(VENV) .vllm .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

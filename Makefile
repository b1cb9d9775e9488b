# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := orchestrator stages cluster models
CODE := $(PACKAGES) tests benchmarks examples

.PHONY: setup demo test test-faults test-cluster check lint format types clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed,jobs,s3]'
	@touch $@

demo: setup
	$(BIN)/coalesce run quickstart

# Two processes share the tests, file by file; WORKERS=0 is one process, for a debugger.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# All but what `test-faults` and, unless LAB is set, `test-cluster` do; `.ci/run` calls it.
test: setup lint types
	COALESCE_SLURM_LAB=$(LAB) $(PYTEST) -m "$(if $(LAB),,not slurm and )not fault" --durations=20

# Workers, nodes, networks and memory broken for real, for about a quarter of an hour. Root sees more.
test-faults: setup
	$(BIN)/python -m pytest -m fault

# A real Slurm of two nodes on this machine, from Debian's packages. Needs root; installs them.
# LAB=optional skips the tests, and says why, where no Slurm can be set up.
test-cluster: setup
	COALESCE_SLURM_LAB=$(or $(LAB),required) $(BIN)/python -m pytest -m slurm --durations=0

# Before each commit: under two minutes on two cores.
check: setup lint types
	$(PYTEST) -q -m "not slow"

lint: setup
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

format: setup
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache .hypothesis

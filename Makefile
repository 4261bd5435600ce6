# Every target sets itself up from a fresh clone: Python >= 3.10, make and a C compiler are enough.
# `gpu` is the exception: it installs nothing and runs this checkout under PYTHON as it is.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test bench gpu compile lint notebooks clean

help:
	@echo "make demo       real long text through a Llama, dense and sparse: a table and a figure (3 minutes)"
	@echo "make test       every test this machine can run"
	@echo "make bench      speed and memory against dense attention"
	@echo "make compile    every GPU kernel compiled for sm_80, sm_90, sm_100, sm_120; no GPU needed"
	@echo "make gpu        tests and sanitizers on this machine's GPU, with the packages PYTHON already has"
	@echo "make lint       ruff and mypy"
	@echo "make notebooks  execute every notebook"

demo: $(VENV)/.evals
	$(BIN)/python -m attnlab.evals.demo $(ARGS)

bench: $(VENV)/.evals
	$(BIN)/python -m attnlab.evals.bench $(ARGS)

compile: $(VENV)/.test
	$(BIN)/python -m attnlab.kernels.compile $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(WORKERS) --durations=10 $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(VENV)/.notebooks
	$(BIN)/python -m attnlab.evals.notebooks notebooks

gpu:
	PYTHONPATH=. $(PYTHON) -m attnlab.evals.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "attnlab needs Python 3.10 or newer: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras; it is older than its inputs, or missing, only when something has to be installed.
$(VENV)/.%: constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --no-compile -e '.[$*]'
	@touch $@

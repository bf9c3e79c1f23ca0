# `make` prints what there is. Everything lives in .venv; nothing else on the machine is touched.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# torch goes in first and alone, so that the build you choose is the one that stays. constraints.txt pins the same version.
#   CPU only:      make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   another CUDA:  make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130
# Without TORCH_INDEX the package index's own build is taken (on Linux that is a CUDA one).
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check audit format clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install the toolkit with its development tools (quick when nothing changed)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, then the toolkit, into $(VENV): some minutes, about 2 GB"
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=...")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,tracking]"
	@touch $@

base/tiny: | $(STAMP)
	$(BIN)/finetune base tiny $@

demo: setup base/tiny ## Fine-tune a tiny gpt-oss on legal clauses: before, after, adapter, report
	$(BIN)/finetune train quickstart

# One thread a process and one process a core: torch's threads on a busy machine wait for each other far longer than they
# compute. A file's tests share its fixtures, so they stay in one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

test: setup ## Run the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-slow: setup ## Run only the slow tests
	$(PYTEST) -m slow

check: setup ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not part of check: it needs the advisory database, and an advisory must not break a build that changed nothing.
audit: setup ## Ask the advisory database about the pinned packages (needs the network)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --local --progress-spinner off

format: setup ## Put imports and layout in order
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

clean: ## Remove the environment, caches and build products (runs/ and base/ stay)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

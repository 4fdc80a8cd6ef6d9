# Start with `make demo` and `make test`; each target sets up .venv first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# DeepSpeed's compiled collectives go into this folder, so that builds of other projects cannot lock them.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## create .venv with the pinned packages and compile DeepSpeed's collectives

$(STAMP): pyproject.toml infra/constraints.txt
	@bash infra/setup.sh $(PYTHON) $(VENV)
	@touch $@

demo: $(STAMP)  ## simulate a cohort, build shards, pretrain, evaluate and compare (five minutes with the set-up)
	@bash infra/demo/run.sh

experiment: $(STAMP)  ## run the experiment of docs/experiments.md on simulated people (2 cores: under an hour)
	@$(BIN)/python -m evaluation.experiments.run

experiment2: $(STAMP)  ## run the pieces of docs/experiments_2.md that are not done (2 cores: about four hours)
	@$(BIN)/python -m evaluation.experiments.second

PYTEST := $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: $(STAMP)  ## run the tests, without those marked jobs, slow or gpu
	@$(PYTEST)

test-jobs: $(STAMP)  ## run the tests of whole jobs: killed runs, two hosts, other machines, the tutorials
	@$(PYTEST) -m 'jobs and not slow and not gpu'

test-packages:  ## install the Debian packages that some tests need (as root)
	@bash infra/test_packages.sh

test-all: $(STAMP)  ## run every test that this machine can run
	@$(BIN)/python -m pytest -q -m ''

test-gpu: $(STAMP)  ## run the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu

check: $(STAMP)  ## run ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(STAMP)  ## build the documentation into site/ (start with site/index.html)
	@$(BIN)/mkdocs build

bench: $(STAMP)  ## measure every row beside its peers and write docs/performance.md (two idle cores: about 40 minutes)
	@$(BIN)/python -m tests.benchmarks

bench-gpu: $(STAMP)  ## run the benchmarks on a CUDA device
	@$(BIN)/python -m tests.benchmarks --device gpu

clean:  ## remove outputs, caches and the virtual environment
	rm -rf $(VENV) .cache demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup demo experiment experiment2 test test-jobs test-packages test-all test-gpu check docs bench bench-gpu clean

# `make demo` and `make test` are all a newcomer needs; each sets up .venv first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# DeepSpeed's compiled collectives live in the project, apart from other projects' builds and their locks.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## make .venv with the pinned packages and compile DeepSpeed's collectives

$(STAMP): pyproject.toml infra/constraints.txt
	@bash infra/setup.sh $(PYTHON) $(VENV)
	@touch $@

demo: $(STAMP)  ## the main job on simulated NIfTI input: cohort, shards, pretraining, evaluation, comparison
	@bash infra/demo.sh

experiment: $(STAMP)  ## the experiment of docs/experiments.md on simulated people (2 cores: under an hour)
	@$(BIN)/python -m evaluation.experiments.run

test: $(STAMP)  ## the tests (distributed and integration included; slow and gpu left out)
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-packages:  ## Debian packages without which some tests skip (as root)
	@bash infra/test_packages.sh

test-all: $(STAMP)  ## every test that this machine can run
	@$(BIN)/python -m pytest -q -m ''

test-gpu: $(STAMP)  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu

check: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(STAMP)  ## the benchmarks behind the figures in README and docs
	@$(BIN)/python -m tests.benchmarks

bench-gpu: $(STAMP)  ## the same on a CUDA device
	@$(BIN)/python -m tests.benchmarks --device gpu

clean:  ## remove the demo's output, caches and the virtual environment
	rm -rf $(VENV) .cache demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup demo experiment test test-packages test-all test-gpu check bench bench-gpu clean

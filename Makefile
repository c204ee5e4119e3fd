# Everything here does its own set-up: a machine with Python >= 3.11 is enough. What was installed is remembered by
# stamps in .venv, written last, so that an interrupted installation is done again and a finished one costs nothing.
#
#   make quickstart        train a small Llama on real text and show what came out
#   make lora-quickstart   adapt it by LoRA to questions and answers, export and merge the adapter
#   make test              all tests                     (make test ARGS="-k ranks" for some)
#   make test-slurm        jobs on a SLURM cluster of two nodes, started for it on this machine (Debian: slurm-wlm)
#   make check             format, lint, types, imports  (make fix repairs what can be repaired)
#   make rehearse          a small training under 30 faults and 50 kills (make rehearse ARGS="--ranks 4 --faults 10")
#   make bench             tokens/s here and in transformers   (make bench ARGS=lora: LoRA here and in PEFT)
#   make clean             remove .venv and caches; runs and data stay

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help quickstart lora-quickstart test test-slurm check fix rehearse bench clean

# The first of these that is new enough; `make PYTHON=/path/to/python ...` decides otherwise.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# One exact version: an open range would fetch whatever is newest, and its CUDA packages with it.
TORCH := torch==2.13.0

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

quickstart: .venv/.core
	@$(BIN)/python tools/quickstart.py $(ARGS)

lora-quickstart: .venv/.core
	@$(BIN)/python tools/lora_quickstart.py $(ARGS)

test: .venv/.dev
	@$(BIN)/python -m pytest -m "not slurm" $(ARGS)

test-slurm: .venv/.dev
	@$(BIN)/python -m pytest tests/fault/slurm $(ARGS)

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_meta.py

fix: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

rehearse: .venv/.core
	@$(BIN)/python tools/rehearse.py $(ARGS)

bench: .venv/.bench
	@$(BIN)/python tools/bench.py $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.made:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed and none was found;" \
		"install it, or say where it is: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "error: no such program: $(PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed. make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) can't make virtual environments" \
		"(no ensurepip). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.torch: .venv/.made
	@echo "installing $(TORCH)"
	@$(PIP) install $(TORCH)
	@touch $@

.venv/.core: .venv/.torch pyproject.toml
	@echo "installing what a run needs"
	@$(PIP) install --quiet -e .
	@touch $@

.venv/.bench: .venv/.torch pyproject.toml
	@echo "installing what the benchmark needs"
	@$(PIP) install --quiet -e ".[bench]"
	@touch $@ .venv/.core

.venv/.dev: .venv/.torch pyproject.toml
	@echo "installing what tests and checks need"
	@$(PIP) install --quiet -e ".[dev]"
	@touch $@ .venv/.bench .venv/.core

# Everything here does its own set-up: a machine with Python >= 3.11 is enough. What was installed is remembered by
# stamps in .venv, written last, so that an interrupted installation is done again and a finished one costs nothing.
#
#   make quickstart        train a small Llama on real text and show what came out
#   make lora-quickstart   adapt it by LoRA to questions and answers, export and merge the adapter
#   make test              every claim once              (make test ARGS="-n0 -k ranks" for some)
#   make test-all          all tests, the `long` ones and those of test-slurm too
#   make test-slurm        jobs on a SLURM cluster of two nodes, started for it on this machine (Debian: slurm-wlm)
#   make test-torch        tests with another torch      (make test-torch VERSION=2.14.1 ARGS=tests/layouts)
#   make test-lowest       tests with the lowest versions that pyproject.toml admits, torch's too
#   make test-newest       tests with the newest ones
#   make check             format, lint, types, imports  (make fix repairs what can be repaired)
#   make rehearse          a small training under 30 faults and 50 kills (make rehearse ARGS="--ranks 4 --faults 10")
#   make lock              write .ci/constraints.txt anew from the newest versions that pyproject.toml admits
#   make bench             tokens/s here and in transformers   (make bench ARGS=lora: LoRA here and in PEFT)
#   make clean             remove .venv and caches; runs and data stay

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart lora-quickstart test test-all test-slurm test-torch test-lowest test-newest check fix lock \
	rehearse bench clean

# The first of these that is new enough; `make PYTHON=/path/to/python ...` decides otherwise.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Exact versions of everything that is installed, made by `make lock`. torch comes first and alone: an open range would
# fetch whatever is newest, and its CUDA packages with it.
LOCK := .ci/constraints.txt
TORCH := $(shell sed -n '/^torch==/p' .ci/constraints.txt)
# Two files of tests side by side: many a test waits, and one file's tests share what they compare with. In their own
# order, which has the longest ones early.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

quickstart: $(VENV)/.core
	@$(BIN)/python tools/quickstart.py $(ARGS)

lora-quickstart: $(VENV)/.core
	@$(BIN)/python tools/lora_quickstart.py $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest $(TWO) -m "not slurm and not long" $(ARGS)

test-all: $(VENV)/.dev
	@$(BIN)/python -m pytest $(TWO) $(ARGS)

test-slurm: $(VENV)/.dev
	@$(BIN)/python -m pytest tests/fault/slurm $(ARGS)

test-torch:
	@test -n "$(VERSION)" || { echo "error: say which torch: make test-torch VERSION=2.14.1" >&2; exit 1; }
	@$(MAKE) --no-print-directory test VENV=.venv-torch-$(VERSION) TORCH=torch==$(VERSION)

# The lower end of each range that pyproject.toml declares, torch's too.
test-lowest:
	@mkdir -p .venv-lowest
	@grep -oE '"[A-Za-z0-9_.-]+(\[[a-z]+\])?[>=]=[0-9.]+' pyproject.toml | sed -E 's/"|\[.*\]//g; s/[>=]=/==/' \
		| grep -vE '^(setuptools|flash-attn)=' > .venv-lowest/.new
	@cmp -s .venv-lowest/.new .venv-lowest/.lowest || mv .venv-lowest/.new .venv-lowest/.lowest
	@$(MAKE) --no-print-directory test VENV=.venv-lowest LOCK=.venv-lowest/.lowest \
		TORCH="$$(sed -n '/^torch==/p' .venv-lowest/.lowest)"

test-newest: # made anew, as nothing tells that there is something newer
	@rm -rf .venv-newest
	@$(MAKE) --no-print-directory test VENV=.venv-newest LOCK=/dev/null \
		TORCH='$(shell sed -nE 's/^ *"(torch>=[^"]*)",/\1/p' pyproject.toml)'

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_meta.py

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

rehearse: $(VENV)/.core
	@$(BIN)/python tools/rehearse.py $(ARGS)

bench: $(VENV)/.bench
	@$(BIN)/python tools/bench.py $(ARGS)

# Written from an environment of its own, so that nothing that was installed by hand gets in.
lock:
	@rm -rf .venv-lock
	@$(MAKE) --no-print-directory .venv-lock/.dev VENV=.venv-lock LOCK=/dev/null
	@echo "# Exact versions of what is installed, by 'make lock' with $$($(PYTHON) --version); see CONTRIBUTING.md." \
		> .venv-lock/.constraints
	@.venv-lock/bin/python -m pip freeze --exclude-editable | sed -E 's/\+cpu$$//' \
		| grep -vE '^(nvidia-[a-z0-9-]+|cuda-[a-z]+|triton)==' >> .venv-lock/.constraints
	@mv .venv-lock/.constraints .ci/constraints.txt && rm -rf .venv-lock

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed and none was found;" \
		"install it, or say where it is: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "error: no such program: $(PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed. make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) can't make virtual environments" \
		"(no ensurepip). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@touch $@

# What was installed under another lock is installed again. Of the constraints, torch's is the version asked for: were it
# outside of the declared range, pip would otherwise put another in its place.
$(VENV)/.torch: $(VENV)/.made $(LOCK)
	@echo "installing $(TORCH)"
	@{ sed '/^torch==/d' $(LOCK) && echo '$(TORCH)'; } > $(VENV)/constraints.txt
	@$(PIP) install -c $(VENV)/constraints.txt '$(TORCH)'
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	@echo "installing what a run needs"
	@$(PIP) install --quiet -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	@echo "installing what the benchmark needs"
	@$(PIP) install --quiet -c $(VENV)/constraints.txt -e ".[bench]"
	@touch $@ $(VENV)/.core

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "installing what tests and checks need"
	@$(PIP) install --quiet -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.bench $(VENV)/.core

# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
# PYTHON=... picks the interpreter (3.11 or newer); the first that fits is taken otherwise.

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(VENV)/bin
READY := $(VENV)/.weft-ready
PYTEST := $(BIN)/python -m pytest

# One compute thread per process: two processes on two cores must not fight over them.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
# Hundreds of processes are started: each would compile all of weft again, half a second of its time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow check format lint types order readme bench docs clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo       train a GPT on real text over two local processes, from a plan that weft finds (demo/)"
	@echo "make test       the default tests"
	@echo "make test-slow  the long tests"
	@echo "make check      format, lint, types, import order and README, then the default tests"
	@echo "make bench      every system of the catalogue; records into benchmarks/"
	@echo "make docs       rewrite the generated parts: numbers in README, docs/systems.md, docs/cli.md"
	@echo "make clean      remove the environment and what runs leave behind"

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "weft needs Python 3.11 or newer; install it or say make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	@mkdir -p demo
	$(BIN)/weft train --task language-model --processes 2 --steps 200 \
		--plan-page demo/plan.html --curve demo/loss.svg --save-plan demo/plan.json
	@echo "look at demo/plan.html (the plan) and demo/loss.svg (the loss)"

# Two processes at a time, each with whole files: most tests wait for processes of their own or compute on one core.
test: $(READY)
	$(PYTEST) -n 2 --dist loadfile -m "not slow" $(ARGS)

test-slow: $(READY)
	$(PYTEST) -m slow $(ARGS)

check: format lint types order readme test

format: $(READY)
	$(BIN)/ruff format --check src tests examples

lint: $(READY)
	$(BIN)/ruff check src tests examples

types: $(READY)
	$(BIN)/mypy

order: $(READY)
	$(PYTEST) -q tests/test_package_order.py tests/test_public_api.py tests/test_catalogue.py

readme: $(READY)
	$(PYTEST) -q tests/test_readme.py

bench: $(READY)
	$(BIN)/weft bench --all --record

docs: $(READY)
	$(BIN)/python -m weft.bench.report
	$(BIN)/python -m weft.cli.reference > docs/cli.md

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache

# make env         .venv with the pinned versions; does nothing while pyproject.toml, constraints.txt and Makefile stay as they are
# make quickstart  text, tokenizer, a tiny base model, continual pre-training; MODEL=tiny (default) or smollm2
# make test        lint, then the tests
# make lint        ruff and mypy
# make format      rewrite the sources with ruff

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?=
MODEL ?= tiny
PYTEST_ARGS ?=
VENV := .venv
STAMP := $(VENV)/.made
SOURCES := megacpt kernels tools tests

.PHONY: help env quickstart test lint format

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# Python itself writes no bytecode where PYTHONDONTWRITEBYTECODE is set, as in many containers: every command would then
# compile its modules anew.
env: $(STAMP)
	@$(VENV)/bin/python -m compileall -q megacpt kernels tools

$(STAMP): pyproject.toml constraints.txt Makefile
	@found=
	for candidate in $(or $(PYTHON),python3.12 python3 python3.13); do
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then found=$$candidate; break; fi
	done
	if [[ -z "$$found" ]]; then
	    echo "error: megacpt needs Python 3.12 or newer and found none (python3 is: $$(python3 --version 2>&1 | head -1));" \
	         "install one, or name it: make env PYTHON=/path/to/python3.12" >&2
	    exit 2
	fi
	[[ -x $(VENV)/bin/python ]] || "$$found" -m venv $(VENV)
	echo "installing into $(VENV): about 6 GB, some minutes" >&2
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,quickstart]'
	touch $@

quickstart: env
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash examples/quickstart.sh "$(MODEL)"

lint: env
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy

format: env
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Two commands matter: `make demo` runs the main job on real code, `make test` passes the tests.
# Both make their own virtual environment; nothing needs to be installed by hand but Python 3.11+ and a compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Input bytes, models and steps of the demo: see `cert-ray demo --help`.
DEMO_ARGS ?=
# Workers, nodes and drivers that `make chaos` kills; about ten seconds each on two cores.
CHAOS_KILLS ?= 100
CHAOS_SEED ?= 1

.PHONY: demo test test-quick chaos check format clean help

help:
	@echo "make demo        the whole pipeline on the Python files of this machine, about four minutes on two cores"
	@echo "make test        every test; make test-quick: those without a Ray cluster"
	@echo "make chaos       preprocessing under CHAOS_KILLS=$(CHAOS_KILLS) kills; summary in chaos/summary.md"
	@echo "make check       ruff and mypy"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[client]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/cert-ray demo $(DEMO_ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

test-quick: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not ray and not slow"

chaos: $(VENV)/installed-dev
	$(BIN)/python -m tests.chaos.run --kills $(CHAOS_KILLS) --seed $(CHAOS_SEED) --output chaos

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo chaos .pytest_cache .mypy_cache .ruff_cache build dist

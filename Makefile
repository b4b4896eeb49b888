# Two commands matter: `make demo` runs the main job on real code, `make test` passes the tests.
# Both make their own virtual environment; nothing needs to be installed by hand but Python 3.11+ and a compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The peers' environment, and where the benchmarks put corpora, runs and results.
BENCH_VENV ?= .venv-bench
BENCH_WORK ?= build/bench
BENCH_RUNS ?= 5
# Input bytes, models and steps of the demo: see `cert-ray demo --help`.
DEMO_ARGS ?=
# Workers, nodes and drivers that `make chaos` kills; about ten seconds each on two cores.
CHAOS_KILLS ?= 100
CHAOS_SEED ?= 1
# What builds the image: docker, podman or buildah; what it is told; and the image's name. The one for GPUs has its own:
# make image IMAGE=cert-ray-gpu:0.1.0-ray2.60.0 IMAGE_ARGS="--build-arg BASE=2.60.0-py311-gpu"
IMAGE_TOOL ?= docker
IMAGE_ARGS ?=
IMAGE ?= cert-ray:0.1.0-ray2.60.0

.PHONY: demo test test-quick chaos check audit image docs bench bench-env format clean help

help:
	@echo "make demo        the whole pipeline on the Python files of this machine, minutes on two cores"
	@echo "make test        every test; make test-quick: those without a Ray cluster"
	@echo "make chaos       preprocessing under CHAOS_KILLS=$(CHAOS_KILLS) kills; summary in chaos/summary.md"
	@echo "make check       ruff and mypy"
	@echo "make audit       known vulnerabilities of what the image's lock pins; a report, never a failure"
	@echo "make image       cluster/Dockerfile by IMAGE_TOOL=$(IMAGE_TOOL) (or podman, buildah) with IMAGE_ARGS"
	@echo "make docs        docs/ as a site, in build/docs"
	@echo "make bench       every benchmark beside its peers, hours: see tests/bench/README.md; make bench-env: the peers"

# A new venv has the pip that Python came with; Debian 12's, 23.0.1, takes forever to add packages to those of `make demo`.
new_venv = $(PYTHON) -m venv $(1) && $(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip

$(VENV)/installed: pyproject.toml constraints.txt
	$(call new_venv,$(VENV))
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[client]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/cert-ray demo $(DEMO_ARGS)

# Tests without Ray run side by side, a file in one process; those with it share its one cluster.
PYTEST_SIDE_BY_SIDE = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: $(VENV)/installed-dev
	$(PYTEST_SIDE_BY_SIDE) -m "not ray"
	$(BIN)/python -m pytest -m ray

test-quick: $(VENV)/installed-dev
	$(PYTEST_SIDE_BY_SIDE) -m "not ray and not slow"

chaos: $(VENV)/installed-dev
	$(BIN)/python -m tests.chaos.run --kills $(CHAOS_KILLS) --seed $(CHAOS_SEED) --output chaos

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(VENV)/installed-dev
	@$(BIN)/python cluster/audit.py

# docker finds the list of what stays out by itself.
image:
	$(IMAGE_TOOL) build -f cluster/Dockerfile $(if $(filter-out docker,$(IMAGE_TOOL)),--ignorefile cluster/Dockerfile.dockerignore) \
		-t $(IMAGE) $(IMAGE_ARGS) .

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs build --strict --quiet

$(BENCH_VENV)/installed: tests/bench/requirements.txt
	$(call new_venv,$(BENCH_VENV))
	$(BENCH_VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/bench/requirements.txt
	@touch $@

bench-env: $(BENCH_VENV)/installed

BENCH := PYTHONPATH=$(CURDIR) $(BIN)/python -m tests.bench
BENCH_SIDES = --tables $(BENCH_WORK)/tables --peers $(BENCH_VENV)/bin/python --output $(BENCH_WORK)/results --runs $(BENCH_RUNS)

bench: $(VENV)/installed-dev bench-env
	$(BENCH).fetch_corpus --output $(BENCH_WORK)/corpus
	$(BENCH).tabulate_corpus --output $(BENCH_WORK)/tables $(BENCH_WORK)/corpus/sdists
	$(BENCH).bench_sketch $(BENCH_SIDES) --all
	$(BENCH).bench_dedup $(BENCH_SIDES) --work $(BENCH_WORK)/dedup
	$(BENCH).bench_preprocess $(BENCH_SIDES) --work $(BENCH_WORK)/preprocess
	$(BENCH).bench_growth --output $(BENCH_WORK)/results --work $(BENCH_WORK)/growth --runs $(BENCH_RUNS) \
		--write-costs $(BENCH_WORK)/results/costs.yaml

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo chaos .pytest_cache .mypy_cache .ruff_cache build dist

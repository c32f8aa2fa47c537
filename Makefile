# Every target sets up what it needs: `make demo` or `make test` on a fresh clone is enough.
# PYTHON=python3.12 make install   another interpreter       ARGS='-k beam' make test   further arguments

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
SEED ?= 0
OUT ?= runs/demo
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.engine-fast-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILT_FROM := pyproject.toml setup.py engine_fast/extension.py $(shell find csrc -type f -name '*.[hc]*')

.PHONY: help install demo test test-slow check format cuda-check bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

install: $(STAMP)  ## .venv with torch, DeepSpeed and this package, compiled

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "make: $(PYTHON) was not found. Install Python 3.11 or later, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) found, 3.11 or later is needed. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "make: this Python cannot make virtual environments (Debian, Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first: DeepSpeed and the extension are built against the one that is installed.
$(STAMP): $(BUILT_FROM) | $(BIN)/python
	@compiler=$${CXX:-g++}; command -v $${compiler%% *} > /dev/null || { echo "make: the C++ compiler $$compiler was not found. Install g++ (Debian, Ubuntu: apt-get install g++) or set CXX." >&2; exit 1; }
	$(PIP) install -q --upgrade pip 'setuptools>=77' wheel
	$(PIP) install $(TORCH)
	$(PIP) install -q ninja pybind11 packaging psutil py-cpuinfo
	DS_BUILD_OPS=0 $(PIP) install --no-build-isolation deepspeed==0.19.8
	$(PIP) install --no-build-isolation -e '.[dev]'
	@touch $@

demo: install  ## generated corpus to ENGINE student, with a report (minutes on two cores)
	$(BIN)/engine-fast demo --out $(OUT) --seed $(SEED) $(ARGS)

# One thread a worker: torch's own pool in each of them makes two cores slower, not faster.
test: install  ## the test suite
	@tests/cluster/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests $(ARGS)

test-slow: install  ## the tests that take minutes
	@tests/cluster/install.sh
	@tests/browser/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests $(ARGS)

check: install  ## ruff, formatting, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cuda-check: install  ## compile the CUDA sources where nvcc exists; needs no GPU
	.ci/cuda-check $(BIN)/python

bench: install  ## every benchmark, one after the other; fails at the end if any fell below a floor
	@failed=""; for file in benchmarks/bench_*.py; do \
	  module=benchmarks.$$(basename $$file .py); echo "== $$module"; \
	  $(BIN)/python -m $$module $(ARGS) || failed="$$failed $$module"; done; \
	if [ -n "$$failed" ]; then echo "make: failed:$$failed" >&2; exit 1; fi

clean:  ## remove what was built; runs/ and .venv stay
	rm -rf build *.egg-info engine_fast/_C.*.so $(STAMP) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find engine_fast tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

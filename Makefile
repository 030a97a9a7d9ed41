# Everything here sets up its own virtual environment in .venv first; only Python 3.11+, make and a package index are needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := src tests benchmarks examples
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check test-fast format clean help

help:
	@echo "make demo       synthetic parts -> fit -> evaluate -> demo/report-bracket/report.html"
	@echo "make test       static checks and the whole test suite (what CI runs)"
	@echo "make test-fast  the test suite without the slow tests"
	@echo "make check      ruff, mypy, import contracts"
	@echo "make format     let ruff format the code"
	@echo "make clean      remove .venv and what demo and tests wrote"

demo: $(VENV)/demo.stamp
	$(BIN)/polyspect demo --out demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2

test-fast: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 -m "not slow"

check: $(VENV)/dev.stamp
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "polyspect needs Python 3.11 or newer, e.g. make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	$(PIP) --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache

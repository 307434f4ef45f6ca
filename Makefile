# Everything runs in .venv, which is built on the first use and again when its inputs change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test check format docs docs-pages clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("kprep needs Python 3.11 or newer; run make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[train,dask,youtube,readers,dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/kprep demo demo

# one process for each core, four at most; a file's tests stay in one, with what they share
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# what is written by programs: the command line's page, and what other readers make of a dataset
docs-pages: $(STAMP)
	$(BIN)/python docs/tools/commands.py
	KPREP_WRITE_DOCS=1 $(BIN)/python -m pytest -q tests/test_readers.py

clean:
	rm -rf .venv demo dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis

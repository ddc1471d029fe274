# `make quick`, `make run` and `make test` do everything. All commands make .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quick run installs quick_said said test docs lint format clean

quick: installs quick_said $(STAMP)  ## what one token does to the embedded model, without a search: a minute or two
	$(BIN)/cushion experiment=quick

run: installs said $(STAMP)  ## the main job on the embedded model: outliers, greedy prefix, tuned prefix, quantized perplexity
	$(BIN)/cushion experiment=main

installs:
	@test -e $(STAMP) || echo "Installs into $(VENV) first; the time is that of the download, which on Linux has gigabytes of CUDA libraries."

quick_said:
	@echo "SmolLM2-135M on English text, on this machine alone: measures full precision and W8A8, each without a prefix and behind one"
	@echo "token, over 4 blocks of 512 tokens. A minute or two on 2 free CPU cores. make run searches the prefix, and tunes it."

said:
	@echo "SmolLM2-135M on English text, on this machine alone: searches a prefix among all 49,152 tokens, tunes it in 60 steps, and"
	@echo "measures six rows, in full precision and in W8A8, over 16 blocks of 512 tokens. 5 to 7 minutes on 2 free CPU cores with"
	@echo "AVX512, most of them search and tuning; bars show the time that is left. make quick shows the effect sooner."

test: $(STAMP)  ## the test suite, a worker for each core
	$(BIN)/python -m pytest -n auto --dist worksteal

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

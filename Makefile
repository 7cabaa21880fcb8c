# `make demo` and `make test` work from a fresh clone; they install into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo_out

# Large pages, and none of them given back to the system between the steps of a benchmark.
KEEP_MEMORY := glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=34359738368:glibc.malloc.trim_threshold=34359738368

.PHONY: demo test test-all lint format bench clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.train: pyproject.toml | $(VENV)/bin/python
	@echo "installing the training packages into $(VENV) (about a minute)"
	$(BIN)/python -m pip install --quiet --editable ".[train]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing the development packages into $(VENV) (about a minute)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.train

demo: $(VENV)/.train  ## scenes -> training -> held-out clips -> scores -> report, in $(OUT)
	$(BIN)/python -m launch.demo --out $(OUT)

test: $(VENV)/.dev  ## the default tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.dev  ## also the slow tests and those that need a browser
	$(BIN)/python -m pytest -n 2 --dist worksteal --all

lint: $(VENV)/.dev  ## style, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## timings, printed as tables; PyTorch is installed for the comparison
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m benchmarks.step
	GLIBC_TUNABLES=$(KEEP_MEMORY) $(BIN)/python -m benchmarks.against_torch

clean:
	rm -rf $(VENV) build dist *.egg-info demo_out .pytest_cache

# Every target makes its own virtual environment in .venv; nothing else is needed than Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# on machines without a GPU, one thread per process keeps tests from disturbing each other
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: install train test test-trackio test-alfworld test-vllm check lint types format clean

PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(VENV)/.runs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[tensorboard]'
	touch $@

$(VENV)/.installed: $(VENV)/.runs
	$(PIP) --editable '.[dev]'
	touch $@

install: $(VENV)/.runs  ## what a run needs, into .venv

train: $(VENV)/.runs  ## the main job: EZPoints, tiny model, CPU
	$(BIN)/gtr-turbo train $(ARGS)

test: $(VENV)/.installed  ## lint, types and all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

check: test

test-trackio:  ## trackio and the pinned pillow exclude each other, so it is tested apart; no torch needed
	$(PYTHON) -m venv .venv-trackio
	.venv-trackio/bin/pip install --quiet --disable-pip-version-check trackio==0.43.0 pytest
	PYTHONPATH=src TRACKIO_DIR=$$(mktemp -d) .venv-trackio/bin/python -m pytest -W default tests/real_trackio.py

test-alfworld:  ## ALFWorld's text engine, and its THOR classes over a fake simulator; needs cmake and g++, no torch
	$(PYTHON) -m venv .venv-alfworld
	CMAKE_BUILD_PARALLEL_LEVEL=2 MAKEFLAGS=-j2 .venv-alfworld/bin/pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt alfworld==0.4.2 gymnasium numpy pillow pytest
	PYTHONPATH=src $(TEST_ENV) .venv-alfworld/bin/python -m pytest tests/envs/test_household_textworld.py \
		tests/envs/test_household_thor.py tests/envs/test_household_differential.py

test-vllm:  ## the engine with vLLM itself (its CPU build, which wants versions of its own), tested apart
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/vllm_cpu/requirements.txt
	PYTHONPATH=src:tests:tests/vllm_cpu VLLM_CPU_KVCACHE_SPACE=1 $(TEST_ENV) \
		.venv-vllm/bin/python -m pytest -W default tests/real_vllm.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-trackio .venv-alfworld .venv-vllm .mypy_cache .ruff_cache

# All set-up happens here: a fresh machine needs Python 3.11 or later, and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUNTIME := .venv-runtime
BIN := $(VENV)/bin

.PHONY: demo test test-gpu check lint format pytest docs clean

demo: $(VENV)/installed
	$(BIN)/cclip-deploy demo

test: check

check: lint pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pytest: $(VENV)/installed $(RUNTIME)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# On a machine with an NVIDIA GPU: everything that was never run on one, and a results file to commit. A bundle of your own
# is timed too: make test-gpu BUNDLE=rn101.cclip. Elsewhere every test is skipped, with the reason.
test-gpu: $(VENV)/installed
	CCLIP_GPU_RESULTS=docs/measurements/gpu CCLIP_GPU_BUNDLE=$(BUNDLE) $(BIN)/python -m pytest tests/gpu -m gpu -v

# The documentation site, in runs/site.
docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Development environment: every extra that can be installed from PyPI alone.
$(VENV)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# What a server gets: no torch, no onnx. The tests run a bundle in it.
$(RUNTIME)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear $(RUNTIME)
	$(RUNTIME)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,medical]'
	touch $@

clean:
	rm -rf $(VENV) $(RUNTIME) runs .cache .mypy_cache .ruff_cache .pytest_cache

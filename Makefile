# make train · make test · make bench · make lint: each makes what it needs
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# rebuilt when the requirements change
INSTALLED = $(VENV)/.installed
$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $(INSTALLED)

.PHONY: train test test-slow test-min lint bench
train: $(INSTALLED)
	$(BIN)/python train.py

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m 'slow and not gpu'

# without wandb, torch-optimizer and every extra: what does not use them runs
test-min: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_minimal.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m tools.bench.overhead

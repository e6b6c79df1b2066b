# make train · make test · make bench · make lint: each makes what it needs
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# tests run several processes on few cores, where OpenMP's threads must not spin while they wait
TEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

# rebuilt when the requirements change
INSTALLED = $(VENV)/.installed
$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $(INSTALLED)

# DeepSpeed asks for torch at build time, so it can't be one of the extras
DEEPSPEED = $(VENV)/.deepspeed
$(DEEPSPEED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-build-isolation deepspeed
	touch $(DEEPSPEED)

.PHONY: train test test-slow test-min lint bench install-deepspeed
install-deepspeed: $(DEEPSPEED)

train: $(INSTALLED)
	$(BIN)/python train.py

test: $(DEEPSPEED) lint
	$(TEST) -m 'not slow and not gpu'

test-slow: $(DEEPSPEED)
	$(TEST) -m 'slow and not gpu'

# without wandb, torch-optimizer and every extra: what does not use them runs
test-min: $(INSTALLED)
	$(TEST) tests/test_minimal.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m tools.bench.overhead

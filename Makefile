# Each target does its own set-up: a virtual environment in .venv with what pyproject.toml asks for. In the container
# the packages are there already; MNIST_CNN_BIN says where.
PYTHON ?= python3
BIN := $(or $(MNIST_CNN_BIN),.venv/bin)
READY := $(if $(MNIST_CNN_BIN),,.venv/installed)
# Versions that the output file has already are kept, whatever has been released since.
COMPILE = $(BIN)/uv pip compile pyproject.toml --quiet --system-certs --python $(BIN)/python --all-extras \
	--generate-hashes --universal --python-version 3.11 --custom-compile-command "make lock" --output-file

.PHONY: train test tensorboard lock audit clean

train: $(READY) ## train, validate and test the CNN of configs/base.yaml
	$(BIN)/python main.py fit --config configs/base.yaml

test: $(READY) ## all checks and tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@new=$$(mktemp) && trap "rm $$new" EXIT && cp requirements.lock $$new && $(COMPILE) $$new && \
	{ diff $$new requirements.lock || { echo "error: requirements.lock isn't up to date: make lock" >&2; exit 1; }; }
	$(BIN)/python -m pytest

tensorboard: $(READY) ## look at the runs on http://localhost:6006
	$(BIN)/tensorboard --logdir logs

lock: $(READY) ## requirements.lock: what pyproject.toml asks for, pinned; UPGRADE=1: the newest of everything
	$(COMPILE) requirements.lock $(if $(UPGRADE),--upgrade)

audit: $(READY) ## known vulnerabilities of what is in requirements.lock
	$(BIN)/uv tool run --system-certs pip-audit --requirement requirements.lock --require-hashes --disable-pip --strict

clean: ## remove the virtual environment; runs stay
	rm -rf .venv

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[augment,cluster,dev,report]'
	touch $@

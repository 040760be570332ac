# Each target does its own set-up: a virtual environment in .venv with what pyproject.toml asks for.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test tensorboard clean

train: .venv/installed ## train, validate and test the CNN of configs/base.yaml
	$(BIN)/python main.py fit --config configs/base.yaml

test: .venv/installed ## all checks and tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

tensorboard: .venv/installed ## look at the runs on http://localhost:6006
	$(BIN)/tensorboard --logdir logs

clean: ## remove the virtual environment; runs stay
	rm -rf .venv

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[augment,dev,report]'
	touch $@

# Each target creates the virtual environment .venv from pyproject.toml if there is none. In the container the packages
# are installed already; MNIST_CNN_BIN says where.
PYTHON ?= python3
BIN := $(or $(MNIST_CNN_BIN),.venv/bin)
READY := $(if $(MNIST_CNN_BIN),,.venv/installed)
# Keeps the versions that the output file has already.
COMPILE = $(BIN)/uv pip compile pyproject.toml --quiet --system-certs --python $(BIN)/python --all-extras \
	--generate-hashes --universal --python-version 3.11 --custom-compile-command "make lock" --output-file

.PHONY: train test stress tensorboard lock check-lock audit clean

train: $(READY) ## train, validate and test the CNN of configs/base.yaml
	$(BIN)/python main.py fit --config configs/base.yaml

test: $(READY) ## everyday checks and tests: 5 minutes
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

stress: $(READY) ## slow tests: kills, full disks, SLURM, browser, several processes, accuracies: 25 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/stress

tensorboard: $(READY) ## show the runs on http://localhost:6006
	$(BIN)/tensorboard --logdir logs

lock: $(READY) ## pin the dependencies in requirements.lock; UPGRADE=1: to their newest versions
	$(COMPILE) requirements.lock $(if $(UPGRADE),--upgrade)

check-lock: $(READY) ## check that requirements.lock fits pyproject.toml
	@new=$$(mktemp) && trap "rm $$new" EXIT && cp requirements.lock $$new && $(COMPILE) $$new && \
	{ diff $$new requirements.lock || { echo "error: requirements.lock is out of date: make lock" >&2; exit 1; }; }

audit: $(READY) ## known vulnerabilities of the packages in requirements.lock
	$(BIN)/uv tool run --system-certs pip-audit --requirement requirements.lock --require-hashes --disable-pip --strict

clean: ## remove the virtual environment; runs stay
	rm -rf .venv

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[augment,cluster,dev]'
	touch $@

# Each target creates the virtual environment .venv from pyproject.toml if there is none. In the container the packages
# are installed already; MNIST_CNN_BIN says where.
PYTHON ?= python3
BIN := $(or $(MNIST_CNN_BIN),.venv/bin)
READY := $(if $(MNIST_CNN_BIN),,.venv/installed)
# Keeps the versions that the output file has already.
COMPILE = $(BIN)/uv pip compile pyproject.toml --quiet --system-certs --python $(BIN)/python --all-extras \
	--generate-hashes --universal --python-version 3.11 --custom-compile-command "make lock" --output-file

.PHONY: train test stress gpu tensorboard schema lock check-lock audit clean

train: $(READY) ## train, validate and test the CNN of configs/base.yaml
	$(BIN)/python main.py fit --config configs/base.yaml

test: $(READY) ## everyday checks and tests: 5 minutes
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

stress: $(READY) ## slow tests: kills, full disks, SLURM, browser, several processes, accuracies: 25 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/stress

gpu: $(READY) ## measure on one GPU, in at most 8 minutes, and write docs/gpu.md
	$(BIN)/python benchmarks/gpu.py

# A chart that TensorBoard pins above the others: JSON, URL-encoded.
PIN = %7B%22plugin%22:%22scalars%22,%22tag%22:%22$(1)%22%7D
tensorboard: $(READY) ## show the runs on http://localhost:6006, loss and accuracy first
	@echo 'open http://localhost:6006/?pinnedCards=%5B$(call PIN,train/loss),$(call PIN,val/loss),$(call PIN,train/acc),$(call PIN,val/acc)%5D'
	$(BIN)/tensorboard --logdir logs

schema: $(READY) ## schema.json, with which an editor checks and completes the configs
	$(BIN)/python -m mnist_cnn.run.schema > schema.json

lock: $(READY) ## pin the dependencies in requirements.lock; UPGRADE=1: to their newest versions
	$(COMPILE) requirements.lock $(if $(UPGRADE),--upgrade)

check-lock: $(READY) ## check that requirements.lock fits pyproject.toml
	@new=$$(mktemp) && trap "rm $$new" EXIT && cp requirements.lock $$new && $(COMPILE) $$new && \
	{ diff $$new requirements.lock || { echo "error: requirements.lock is out of date: make lock" >&2; exit 1; }; }

audit: $(READY) ## known vulnerabilities of the packages in requirements.lock
	$(BIN)/uv tool run --system-certs pip-audit --requirement requirements.lock --require-hashes --disable-pip --strict

clean: ## remove the virtual environment; runs stay
	rm -rf .venv

EXTRAS = '.[augment,cluster,dev,graph,search]'
.venv/installed: pyproject.toml
ifneq ($(shell command -v uv),)
	uv venv --quiet --seed --allow-existing --python $(PYTHON) .venv
	uv pip install --quiet --python .venv/bin/python --editable $(EXTRAS)
else
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable $(EXTRAS)
endif
	touch $@

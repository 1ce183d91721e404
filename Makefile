# Every target sets up .venv by itself; the second time that costs nothing.

PYTHON_BIN := .venv/bin/python
WORKDIR ?= runs/quickstart
TEST_WORKERS ?= 2
GPU_TEST_WORKERS ?= 4

.PHONY: help setup train test test-all test-gpu check format clean

help:
	@echo "make train     train a small Lazy Attention model on English every Python carries"
	@echo "make test      check style and types, run the tests (minutes, CPU)"
	@echo "make test-all  the same with the slow tests"
	@echo "make test-gpu  the fused kernels' tests, on an NVIDIA GPU (BUILD.md says what to install)"
	@echo "make format    format the code"

setup:
	@tools/setup

train: setup
	@$(PYTHON_BIN) train.py --config=configs/quickstart.py --workdir=$(WORKDIR)

check: setup
	@$(PYTHON_BIN) -m ruff check .
	@$(PYTHON_BIN) -m ruff format --check --quiet .
	@$(PYTHON_BIN) -m mypy

test: check
	@$(PYTHON_BIN) -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow"

test-all: check
	@$(PYTHON_BIN) -m pytest -n $(TEST_WORKERS) --dist loadfile

# By file: in a process that also has the interpreter's tests, kernels would be interpreted.
test-gpu: setup
	@$(PYTHON_BIN) -m tests.pallas_kernels.find_gpu
	@XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON_BIN) -m pytest -n $(GPU_TEST_WORKERS) -m gpu \
	  tests/pallas_kernels/test_*_gpu.py

format: setup
	@$(PYTHON_BIN) -m ruff check --fix --quiet .
	@$(PYTHON_BIN) -m ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .hypothesis

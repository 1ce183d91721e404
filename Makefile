# Every target sets up .venv by itself; the second time that costs nothing.

PYTHON_BIN := .venv/bin/python
WORKDIR ?= runs/quickstart
TEST_WORKERS ?= 2

.PHONY: help setup train test test-all check format clean

help:
	@echo "make train     train a small Lazy Attention model on English every Python carries"
	@echo "make test      check style and types, run the tests (minutes, CPU)"
	@echo "make test-all  the same with the slow tests"
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

format: setup
	@$(PYTHON_BIN) -m ruff check --fix --quiet .
	@$(PYTHON_BIN) -m ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .hypothesis

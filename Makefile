# Every target sets up .venv by itself; the second time that costs nothing.

PYTHON_BIN := .venv/bin/python
WORKDIR ?= runs/quickstart
TEST_WORKERS ?= 2
GPU_TEST_WORKERS ?= 4

LIBTPU ?= build/libtpu
TPU_REPORT ?= build/tpu_report

.PHONY: help setup train test test-all test-jax test-gpu test-tpu test-tpu-device libtpu docs check format clean

help:
	@echo "make train     train a small Lazy Attention model on English every Python carries"
	@echo "make check     check style and types"
	@echo "make test      the same, and the tests that are not slow (minutes, CPU)"
	@echo "make test-all  the same with the slow tests"
	@echo "make test-jax  what another JAX can break, with the oldest and the newest it runs with"
	@echo "make test-gpu  the fused kernels' tests, on an NVIDIA GPU (BUILD.md says what to install)"
	@echo "make test-tpu  the TPU kernels interpreted and compiled for every TPU, without one"
	@echo "make libtpu    get the TPU compiler for \`train.py --mode=compile\` (700 MB, into build/)"
	@echo "make test-tpu-device  their numbers and times on a TPU, as one report to send back"
	@echo "make docs      build the site of the documents into build/docs/site, its links checked"
	@echo "make format    format the code"

setup:
	@tools/setup

train: setup
	@$(PYTHON_BIN) train.py --config=configs/quickstart.py --workdir=$(WORKDIR)

check: setup
	@$(PYTHON_BIN) -m ruff check .
	@$(PYTHON_BIN) -m ruff format --check --quiet .
	@$(PYTHON_BIN) -m mypy

# In the order of their names, files end with short ones, so that no worker waits for another.
# Bytecode is kept, also where it usually is not: making it takes a worker four seconds.
TESTS := PYTHONDONTWRITEBYTECODE= $(PYTHON_BIN) -m pytest -n $(TEST_WORKERS) --dist loadfile \
  --no-loadscope-reorder -p tests.cpu_seconds

test: check
	@$(TESTS) -m "not slow"

test-all: check
	@$(TESTS)

test-jax: setup
	@TEST_WORKERS=$(TEST_WORKERS) tools/test_jax

# By file: in a process that also has the interpreter's tests, kernels would be interpreted.
test-gpu: setup
	@$(PYTHON_BIN) -m tests.pallas_kernels.find_gpu
	@XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_autotune_level=0 \
	  $(PYTHON_BIN) -m pytest -n $(GPU_TEST_WORKERS) -m gpu tests/pallas_kernels/test_*_gpu.py \
	  tests/pallas_kernels/*/test_*_gpu.py

# libtpu stays out of .venv: with it there, JAX would look for TPUs in every process.
$(LIBTPU)/libtpu/libtpu.so:
	@$(PYTHON_BIN) -m pip --disable-pip-version-check -q install --no-deps --target $(LIBTPU) \
	  "$$($(PYTHON_BIN) -m benchmarks.tpu_compiler)"

libtpu: setup $(LIBTPU)/libtpu/libtpu.so

test-tpu: setup $(LIBTPU)/libtpu/libtpu.so
	@JAX_PLATFORMS=cpu $(PYTHON_BIN) -m pytest -n $(TEST_WORKERS) tests/pallas_kernels/test_tpu*.py \
	  tests/pallas_kernels/decode/test_tpu.py
	@$(PYTHON_BIN) -m benchmarks.tpu_static --compile --generations=v4,v5e,v5p,v6e,7x \
	  --lengths=4096,32768 --head_dims=64,128
	@$(PYTHON_BIN) -m benchmarks.tpu_static --lengths=4096,16384
	@$(PYTHON_BIN) -m benchmarks.decode_static --generations=v4,v5e,v5p,v6e,7x
	@$(PYTHON_BIN) -m pytest tests/compile
	@$(PYTHON_BIN) train.py --mode=compile --config=configs/fineweb_edu.py:lazy_340m_10b --topology=v5p:2x2x1

# On a machine with a TPU and requirements/tpu.txt. One report, to be sent back as it is.
test-tpu-device: setup
	@mkdir -p $(dir $(TPU_REPORT))
	@{ $(PYTHON_BIN) -c "import jax; print(jax.__version__, jax.devices())" && \
	  git log -1 --format=%H; \
	  $(PYTHON_BIN) -m pytest -q tests/pallas_kernels/test_tpu_device.py; \
	  $(PYTHON_BIN) -m benchmarks.attention --implementations=tpu,xla_chunked,splash \
	    --output=$(TPU_REPORT); } 2>&1 | tee $(TPU_REPORT).txt
	@echo "Please send $(TPU_REPORT).txt and $(TPU_REPORT).json with your issue."

docs: setup
	@tools/docs

format: setup
	@$(PYTHON_BIN) -m ruff check --fix --quiet .
	@$(PYTHON_BIN) -m ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .hypothesis

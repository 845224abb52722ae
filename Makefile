# make demo, make test: set-up and all, on a fresh machine. VENV=path reuses an environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= demo-output
JOBS ?= auto
# Tests run side by side, each process with one thread: on two cores that takes half the time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: install demo test lint check-long clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# The demo refuses a folder with something in it; only its own default is cleared.
demo: install
	test "$(OUT)" != demo-output || rm -rf demo-output
	$(BIN)/segkit demo $(OUT)

# Cheap checks first: a misplaced import is known after seconds, not after the tests.
lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow"

check-long: lint
	$(PYTEST)

clean:
	rm -rf .venv demo-output dist .mypy_cache .pytest_cache .ruff_cache

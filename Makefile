# make demo, make test: set-up and all, on a fresh machine. VENV=path reuses an environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= demo-output

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
	$(BIN)/python -m pytest -m "not slow"

check-long: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv demo-output dist .mypy_cache .pytest_cache .ruff_cache

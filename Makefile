# make sample   draw a sheet of pictures of six phrases into out/
# make test     run the test suite
# make lint     style, import directions, types
# make clean    remove what the commands above made
#
# PYTHON names the interpreter that makes the virtual environment, VENV the folder it goes into; PHRASES what the sheet
# shows, a row each: make sample PHRASES='"a red apple" "an owl, 3d style"'

PYTHON ?= python3
VENV ?= .venv
SHEET ?= out/sample.png
PHRASES ?= "red apple, flat style" "grinning face, noto style" "a blue heart" "a green apple" "person running" "a fire"

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help sample test lint clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# pip is the last thing a new environment gets, so one that was interrupted is completed.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "nextscale: no '$(PYTHON)' here; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "nextscale: $$($(PYTHON) --version) is too old; Python 3.10 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "nextscale: '$(PYTHON)' cannot make virtual environments; install its venv package (Debian: apt install python3-venv)"; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The stamps say for which pyproject.toml the environment was filled, so a second call starts at once.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo "installing nextscale and PyTorch into $(VENV) (once; a few minutes, mostly download)"
	@$(PIP) install -q -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	@echo "installing nextscale, PyTorch and the test tools into $(VENV) (once; a few minutes, mostly download)"
	@$(PIP) install -q -e '.[dev]'
	@touch $@ $(VENV)/.installed

sample: $(VENV)/.installed
	@echo "drawing a sheet of pictures (the first import of PyTorch takes some seconds)"
	@mkdir -p $(dir $(SHEET))
	@$(BIN)/nextscale generate $(PHRASES) --count 8 --precision bf16 --out $(SHEET)
	@echo "the sheet is at $(abspath $(SHEET))"

test: $(VENV)/.installed-dev
	@echo "running the test suite (under 12 minutes on two cores)"
	@$(BIN)/python -m pytest -q --durations=10

lint: $(VENV)/.installed-dev
	@echo "ruff: style and mistakes"
	@$(BIN)/ruff check .
	@echo "import-linter: imports point down only"
	@$(BIN)/lint-imports --no-cache
	@echo "mypy: types of the library"
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) out build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache

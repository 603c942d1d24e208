# make demo      the main job, on the bundled miniature
# make test      lint, types, tests
# make fidelity  the fidelity table of the README

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
TORCH ?= torch==2.13.0

BIN := .venv/bin

.PHONY: demo test fidelity

demo: .venv/installed
	$(BIN)/fdcompile demo

test: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

fidelity: .venv/installed
	$(BIN)/python -m benchmarks.fidelity

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fdcompile needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# torch first, so that the dependencies do not bring another build of it.
.venv/installed-dev: EXTRAS := [dev]
.venv/installed .venv/installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip show --quiet torch 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install --editable '.$(EXTRAS)'
	touch .venv/installed $@

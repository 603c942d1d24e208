# make demo         the main job, on the bundled miniature
# make test         lint, types, tests
# make fidelity     the fidelity table of the README
# make bench        speed beside the stock pipeline and its peers, on this machine: benchmarks/results/speed.md
# make bench-dry    walks through what `make bench` does on CUDA, small and on a CPU; measures nothing
# make tables       docs/pipelines.md, out of the tests
# make bench-check  exact figures (FLOPs, operations, calls, compilations) against benchmarks/baseline.json

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
TORCH ?= torch==2.13.0

BIN := .venv/bin

.PHONY: demo test fidelity tables bench bench-dry bench-check

demo: .venv/installed
	$(BIN)/fdcompile demo

test: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2

fidelity: .venv/installed
	$(BIN)/python -m benchmarks.fidelity

tables: .venv/installed-dev
	$(BIN)/python -m pytest tests/pipelines --write-tables

BENCH := $(BIN)/python -m pytest benchmarks/bench_speed.py --timeout=0 --benchmark-quiet

bench: .venv/installed-bench
	$(BENCH) --output benchmarks/results

bench-dry: .venv/installed-bench
	$(BENCH) --dry

bench-check: .venv/installed
	$(BIN)/python -m benchmarks.check

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fdcompile needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# torch first, so that the dependencies do not bring another build of it.
.venv/installed-dev: EXTRAS := [dev]
.venv/installed-bench: EXTRAS := [dev,bench]
.venv/installed .venv/installed-dev .venv/installed-bench: pyproject.toml | $(BIN)/pip
	$(BIN)/pip show --quiet torch 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install --editable '.$(EXTRAS)'
	touch .venv/installed $@

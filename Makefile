# make demo         the main job, on the bundled miniature
# make test         lint, types, tests
# make fidelity     the fidelity table of the README
# make default      the default compared with fewer steps at the same work, on three models: benchmarks/results/default.md
# make ablations    the paper's ablations on the miniature: benchmarks/results/ablations
# make plans        plans for other samplers, guidance scales and seeds: benchmarks/results/plans.md
# make bench        speed compared with the stock pipeline and its peers, on this machine: benchmarks/results/speed.md
# make bench-passes what each optional pass is worth, in FLOPs and in time: benchmarks/results/passes.md
# make bench-dry    walks through what `make bench` does on CUDA, small and on a CPU; measures nothing
# make tables       the tables and the walkthrough in docs/, out of the tests, and the tests that take long
# make engines      engines of TensorRT for RTX for models in their real architecture: docs/tensorrt_rtx.md
# make properties   300 random sequences of what a user may do between and within runs, compared with stock
# make bench-check  exact figures (FLOPs, operations, calls, compilations) and fidelity against those in benchmarks/
# make cuda-standin exact figures on a stand-in for CUDA: captures, launches, layouts; needs the CUDA build of torch
# make gpu          on a machine with a GPU: the tests that need one, and the speed; benchmarks/results/gpu.md

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
TORCH ?= torch==2.13.0
TORCH_TENSORRT ?= torch-tensorrt==2.13.0

BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2

.PHONY: demo test fidelity default ablations plans tables engines properties bench bench-passes bench-dry bench-check cuda-standin gpu

demo: .venv/installed
	$(BIN)/fdcompile demo

test: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) --dist=worksteal # in order, so that most tests of a file share what is expensive

fidelity: .venv/installed
	$(BIN)/python -m benchmarks.fidelity

default: .venv/installed-bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.default

ablations: .venv/installed-dev
	$(BIN)/python -m benchmarks.ablations

plans: .venv/installed
	$(BIN)/python -m benchmarks.plans

TABLES := tests/zoo tests/backends/test_tensorrt.py tests/test_walkthrough.py tests/benchmarks/test_scaling.py

tables: .venv/installed-dev
	$(PYTEST) --dist=loadfile -m '' --write-tables $(TABLES) # a table is written by one process
	$(PYTEST) --dist=worksteal -m tables $(addprefix --ignore=,$(TABLES)) tests

engines: .venv/installed-dev
	PYTHONPATH=.:tests:tests/zoo $(BIN)/python -W ignore tests/backends/engine_table.py $(ENGINES)

properties: .venv/installed-dev
	FDCOMPILE_SEQUENCES=300 $(BIN)/python -m pytest tests/pipeline/test_events.py --timeout=0

BENCH := $(BIN)/python -m pytest benchmarks/bench_speed.py --timeout=0 --benchmark-quiet

bench: .venv/installed-bench
	$(BENCH) --output benchmarks/results

bench-dry: .venv/installed-bench
	$(BENCH) --dry

bench-passes: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.passes

bench-check: .venv/installed
	$(BIN)/python -m benchmarks.check
	$(BIN)/fdcompile gate --steps 20 --key-steps paper --baseline benchmarks/gate.json

# An environment of its own: .venv may have the CPU build of torch.
.venv-cuda/installed: pyproject.toml
	test -d .venv-cuda || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet 'torch==2.14.1' nvidia-cuda-crt==13.0.88 --editable .
	touch $@

cuda-standin: .venv-cuda/installed
	PYTHON=.venv-cuda/bin/python benchmarks/cuda_standin/run.sh $(ARGS)

gpu: .venv/installed-dev
	$(BIN)/python -m benchmarks.gpu

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fdcompile needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# torch first, so that the dependencies do not bring another build of it. Of torch-tensorrt only its Python code is
# tested, with a stand-in for TensorRT, which pip would bring. Most modules are never imported, so none is compiled.
.venv/installed-dev: EXTRAS := [dev]
.venv/installed-bench: EXTRAS := [dev,bench]
.venv/installed .venv/installed-dev .venv/installed-bench: pyproject.toml | $(BIN)/pip
	$(BIN)/pip show --quiet torch 2>/dev/null || $(BIN)/pip install --no-compile $(TORCH)
	$(BIN)/pip install --no-compile --editable '.$(EXTRAS)'
	$(if $(EXTRAS),$(BIN)/pip install --no-deps $(TORCH_TENSORRT))
	touch .venv/installed $@

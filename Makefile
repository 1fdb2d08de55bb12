# The commands of this repository; CI runs the same ones. Everything lives in .venv: a stamp there remembers what is
# installed, so a second run installs nothing. All versions come from constraints.txt (torch is pinned to a version that
# has a CPU build). Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

export ORT_DISABLE_TELEMETRY = 1
ELBOW_PORT ?= 8000
export ELBOW_PORT

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu bench-gpu check bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(VENV)/.core  ## serve the shipped models on port 8000 (or ELBOW_PORT), in the foreground; needs no torch
	@echo "Elbow: http://127.0.0.1:$(ELBOW_PORT) (Ctrl-C ends it)"
	@ELBOW_REPOSITORY=checkpoints exec $(BIN)/elbow-serve run

test: $(VENV)/.dev  ## all tests but those marked slow, gpu, docker or ray; nothing from outside the repository
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-all: $(VENV)/.dev  ## every test; those whose machinery is missing are skipped and say why
	$(BIN)/python -m pytest -m ""

# On a GPU machine PYTHON is used as it is (its torch knows its driver), and nothing is installed.
GPU_ARTIFACTS := runs/gpu-artifacts

$(GPU_ARTIFACTS):
	$(PYTHON) -m training retrace checkpoints/*/1 --to $@.partial && mv $@.partial $@

test-gpu: $(GPU_ARTIFACTS)  ## the tests marked gpu, with PYTHON's own torch
	$(PYTHON) -m pytest -m gpu tests/service/engine tests/service/streams/test_device_lane.py tests/training/data tests/gpu

bench-gpu: $(GPU_ARTIFACTS)  ## benchmarks/gpu.py and kernels.py on cuda, with PYTHON's own torch
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --device cuda --artifacts $(GPU_ARTIFACTS)
	PYTHONPATH=. $(PYTHON) benchmarks/kernels.py --device cuda --artifacts $(GPU_ARTIFACTS)

check: $(VENV)/.dev  ## lint and strict types
	$(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy --explicit-package-bases benchmarks/*.py

# load.py needs wrk and the peers' environments, image.py Docker, gpu.py has its own target, soak.py and overload.py take long.
BENCH := $(filter-out $(patsubst %,benchmarks/%.py,load image gpu soak overload), $(wildcard benchmarks/[a-z]*.py))

bench: $(VENV)/.dev  ## the benchmarks that need nothing but this machine and an hour, one table each
	@set -e; for script in $(BENCH); do echo "== $$script"; $(BIN)/python $$script; done

clean:  ## remove .venv and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Elbow needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The interpreter is an order-only prerequisite: it is a link whose time says nothing.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.core $@

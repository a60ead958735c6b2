# `make demo` and `make test` need Python >= 3.10 and a C++ compiler, and set up the rest in .venv by themselves.
#   PYTHON=python3.12       another interpreter for .venv
#   TORCH_INDEX_URL=https://...   a package index with the torch build of your choice (ROCm, a CUDA version, nightly)
#   ARGS="..."              more arguments for the demo, pytest, gpu-check or the benchmarks
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-gpu gpu-check tritons bench lint venv

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

demo: venv  ## align a small language model with the package's kernels, on this machine
	$(BIN)/grade-kernels demo $(ARGS)

test: venv  ## run all tests, each on the cases that cover the others; with ARGS=--all on every combination
	$(BIN)/python -m pytest -n logical --dist worksteal $(ARGS)

test-gpu: venv  ## run the tests that need a GPU, on it, in the same way
	$(BIN)/python -m pytest -m gpu $(ARGS)

gpu-check: venv  ## a quarter of an hour on a GPU: is it right there, and how fast? Goes on where it stopped; makes a page
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

tritons: venv  ## run what decides about the Triton kernels with every Triton that users have; ARGS="3.6.0": with that one
	PYTHON=$(BIN)/python tools/tritons.sh $(ARGS)

bench: venv  ## check, then time every operation against plain PyTorch
	$(BIN)/python -m pytest benchmarks $(ARGS)
	$(if $(findstring --quick,$(ARGS)),,$(BIN)/python -m benchmarks.training)

lint: venv  ## ruff, mypy, and clang-format for C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -type f -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

# Ninja looks after the sources of csrc, so this costs a fraction of a second when nothing has changed.
venv: .venv/.stamp  ## the set-up alone
	@$(BIN)/python setup.py --quiet build_ext --inplace

.venv/.stamp: pyproject.toml setup.py tools/venv.sh
	@PYTHON="$(PYTHON)" tools/venv.sh .venv
	@touch $@

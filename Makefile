# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
# The commands of this repository. Each sets up .venv first; INSTALL.md says how it is chosen.

SEED ?= 0
# Two processes: the size of the smallest CI machine.
WORKERS ?= 2
# Further arguments for the program behind `make demo`, `make test` and `make soak`.
ARGS ?=
PYTHON ?=
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin

# These choose how .venv is built; the programs run from it must not see them (the launchers
# read PYTHON too, as the interpreter to train with).
unexport PYTHON TORCH_INDEX

.PHONY: help demo test soak lint docs bench-cpu venv clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make demo [SEED=n]    train and evaluate the miniature of the paper on this machine"
	@echo "make test [ARGS=...]  run the test suite (WORKERS=n processes, default 2)"
	@echo "make soak [ARGS=...]  an hour or so: hostile inputs, random kills, thousands of steps"
	@echo "make lint             ruff, mypy and shellcheck"
	@echo "make docs             write the documents' tables anew that mirror the code"
	@echo "make bench-cpu        every benchmark with a tiny model, on this machine's CPU"
	@echo "make venv             only set up .venv"
	@echo "make clean            remove .venv and the tools' caches (never results/)"
	@echo "When .venv is made: PYTHON=python3.12 picks the interpreter, TORCH_INDEX=URL another"
	@echo "build of torch, e.g. the CPU one on Linux (INSTALL.md)."

demo: $(VENV)/.installed
	$(BIN)/python -m scripts.miniworld.demo --seed $(SEED) $(ARGS)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

soak: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/shellcheck .ci/run scripts/*.sh scripts/bench/*.sh scripts/visual_opsd/*.sh examples/slurm.sbatch

docs: $(VENV)/.installed
	$(BIN)/python -m scripts.docs

bench-cpu: $(VENV)/.installed
	$(BIN)/python -m scripts.bench.all --tiny --device cpu --repeats 1 $(ARGS)
	$(BIN)/python -m scripts.bench.gather --tiny --device cpu --repeats 2
	$(BIN)/python -m scripts.bench.saving --tiny --device cpu
	$(BIN)/python -m scripts.bench.optimizer --tiny --device cpu --repeats 2

venv: $(VENV)/.installed-dev

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

INSTALL := PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" bash scripts/make_venv.sh $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt
	$(INSTALL) requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(INSTALL) requirements-dev.txt
	@touch $@

# Another TORCH_INDEX than the one recorded at the last installation: install torch again.
ifneq ($(TORCH_INDEX),)
ifneq ($(TORCH_INDEX),$(shell cat $(VENV)/.torch-index 2>/dev/null))
$(VENV)/.installed: FORCE
endif
endif

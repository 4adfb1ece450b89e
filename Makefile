# Everything runs in .venv, built on first use and again when pyproject.toml changes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?= ../shared/data
# Tests run side by side, a file on one core each.
WORKERS ?= auto
EXPERIMENTS ?= permuted permuted-nn rotated split cifar reservoir density recognition baselines
FUZZ_SECONDS ?= 600
.DEFAULT_GOAL := help

.PHONY: help demo test test-fast check lint types walls fuzz bench durability streams paper wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("supsupd needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,bench]' --group dev
	@touch $@

demo: $(VENV)/.installed ## a real stream of tasks that switch unannounced, learned and served
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed ## all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(VENV)/.installed ## the tests that take seconds
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow'

check: lint types walls ## ruff, mypy and the walls between the folders

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

walls: $(VENV)/.installed
	$(BIN)/lint-imports

fuzz: $(VENV)/.installed ## fuzz each decoder for FUZZ_SECONDS=600; what breaks one stays in build/fuzz
	for name in $$($(BIN)/python tests/fuzz/fuzz.py 2>/dev/null); do mkdir -p build/fuzz/$$name \
	&& $(BIN)/python tests/fuzz/fuzz.py $$name -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/$$name- \
	build/fuzz/$$name tests/fuzz/corpus/$$name || exit; done

bench: $(VENV)/.installed ## speed and memory (DATA=folder with mnist.npz, PEER=checkout of the paper's code, MLSERVER=its python)
	$(BIN)/python benchmarks/bank.py --data $(DATA) $(if $(PEER),--peer $(PEER))
	$(BIN)/python benchmarks/train_step.py $(if $(PEER),--peer $(PEER))
	$(BIN)/python benchmarks/scaling.py --data $(DATA)
	$(BIN)/python benchmarks/serve.py --data $(DATA)
	$(BIN)/python benchmarks/serve_crowd.py --data $(DATA)
	$(BIN)/python benchmarks/hostile.py
	$(if $(MLSERVER),$(BIN)/python benchmarks/serve_peers.py --data $(DATA) --peer-python $(MLSERVER))
	$(BIN)/python benchmarks/codec.py
	$(BIN)/python benchmarks/intake.py
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/documents.py

durability: $(VENV)/.installed ## kills, full disks, lost acknowledgements, damaged files: 45 minutes
	$(BIN)/python benchmarks/durability.py

streams: $(VENV)/.installed ## MNIST streams through the daemon (DATA=folder with mnist.npz)
	$(BIN)/python benchmarks/stream_mnist.py --data $(DATA)/mnist.npz

paper: $(VENV)/.installed ## the paper's experiments on real data, hours (DATA=folder with mnist.npz and cifar10_jpeg.npz)
	for experiment in $(EXPERIMENTS); do $(BIN)/python benchmarks/paper.py $$experiment --data $(DATA) || exit; done
	$(BIN)/python benchmarks/documents.py

wheel: $(VENV)/.installed ## dist/supsupd-*.whl
	$(BIN)/python -m build --wheel

clean: ## remove what was built
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# Every target sets itself up: it needs make and Python 3.11 or newer, nothing else.
# Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The environment is built anew when the interpreter, the requirements or the tested versions change.
KEY := $(shell { $(PYTHON) --version; cat pyproject.toml constraints.txt; } 2>&1 | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(KEY)

export HAYSTACK_TELEMETRY_ENABLED ?= False
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test lint bench bench-gpu quality clean

help: ## Say what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

demo: $(STAMP) ## Ask the embedded model through Haystack, with a compressed and an uncompressed KV cache
	@$(BIN)/python examples/demo.py

test: lint ## Check everything, then run every test (a part: make test ARGS="tests/codec -x")
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --benchmark-disable $(ARGS)

lint: $(STAMP) ## Check style, types and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(STAMP) ## Measure memory and speed on this machine's CPU, into benchmarks/results/
	@$(BIN)/python benchmarks/bench.py $(ARGS)

bench-gpu: $(STAMP) ## Measure kernels, whole generations and memory on a CUDA GPU (needed), into benchmarks/results/ and docs/
	@$(BIN)/python benchmarks/decode_attention.py
	@$(BIN)/python benchmarks/prefix_attention.py
	@$(BIN)/python benchmarks/quantize.py
	@$(BIN)/python benchmarks/prefill.py
	@$(BIN)/python benchmarks/generate.py
	@$(BIN)/python benchmarks/memory.py
	@$(BIN)/python benchmarks/plots.py

quality: $(STAMP) ## Measure what every codec costs a model, into benchmarks/results/ (hours on a CPU; a part: docs/evaluation.md)
	@$(BIN)/python benchmarks/quality.py $(ARGS)

clean: ## Remove the environment, caches and build outputs
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "PYTHON=$(PYTHON) is Python %d.%d; expected 3.11 or newer; name one: make PYTHON=python3.12" % v[:2])'
	@echo "Setting up $(VENV) (a minute or two, once) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	@touch $@

# TokenLab: `make demo` and `make test` make their own environment, once.
#
#   make demo                   train four models on real digits, compare them at counted cost
#   make test                   the quick tests
#   make test PYTHON=python3.12 the same on another Python (the environment is made anew for it)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
STAMP := $(VENV)/.installed-$(PYTHON_VERSION)
BIN := $(VENV)/bin

.PHONY: help demo test test-slow test-exact lint format env clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

demo: env ## train and compare a dense ViT with three token-efficient ones on real digits (runs/demo)
	$(BIN)/python experiments/demo/run.py --workdir=runs/demo

test: env ## the quick tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not exact" $(PYTEST_ARGS)

test-slow: env ## the slow tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow and not exact" $(PYTEST_ARGS)

# The quick tests compile as fast as can be (tests/conftest.py); here numbers are those of the code that users run: of
# the authors' implementations, of the operations that all methods are made of, and what is claimed bit for bit.
test-exact: env ## what compares numbers, with optimised machine code
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" \
	  -k "not test_contract or exact" tests/golden tests/interop/test_vit_weights.py tests/ops tests/contract/test_contract.py $(PYTEST_ARGS)

lint: env ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: ## make the environment in .venv (uv when present, else venv and pip)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "TokenLab needs Python 3.11 or newer; '$(PYTHON)' is $(or $(PYTHON_VERSION),not a Python that runs)." \
	       "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(MAKE) --silent --no-print-directory $(STAMP)

# Made again when pyproject.toml changes or another Python is asked for; an editable install needs no more than that.
# uv does not read pip's configuration, so where uv cannot install, pip may still.
$(STAMP): pyproject.toml
	@exe="$$($(PYTHON) -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)')"; \
	rm -f $(VENV)/.installed-*; \
	have="$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)"; \
	fresh=""; if [ "$$have" != "$(PYTHON_VERSION)" ]; then fresh=1; rm -rf $(VENV); fi; \
	echo "Installing TokenLab for Python $(PYTHON_VERSION) into $(VENV)"; \
	if command -v uv >/dev/null && { [ -z "$$fresh" ] || uv venv --quiet --python "$$exe" $(VENV); } \
	   && uv pip install --quiet --python $(BIN)/python -e '.[dev]'; then \
	  echo "installed with uv"; \
	else \
	  if command -v uv >/dev/null; then echo "uv could not install (see above); trying pip" >&2; fi; \
	  if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then "$$exe" -m venv --clear $(VENV); fi; \
	  $(BIN)/python -m pip install -qq -e '.[dev]'; \
	  echo "installed with pip"; \
	fi
	@touch $@

clean: ## remove environments, caches and runs/demo
	rm -rf .venv .venv312 .cache .pytest_cache .ruff_cache .hypothesis runs/demo
	find tokenlab tests configs experiments -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

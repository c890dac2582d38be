# The main jobs: `make demo` shows the package at work, `make test` tests it. Both prepare all that
# they need in $(VENV) and prepare nothing twice.

PYTHON ?= python3
VENV ?= .venv
# What pip installs as torch into a new environment.
TORCH ?= torch==2.13.0
# How many test processes run side by side.
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
CPP := $(shell find csrc -type f)
# The package is installed editable: only these need another install.
SOURCES := pyproject.toml setup.py find_torch.py compile_library.py $(CPP)
# pip hides what a build says for minutes: of that, tell what is compiled, and all if it fails.
SHELL := bash
INSTALL = echo 'Compiling for this torch, two to three minutes on two cores'; set -o pipefail; \
  $(PIP) install -v -e '.$(1)' 2>&1 | tee $(VENV)/install.log | sed -unE \
  -e "s|^ *\[([0-9]+)/([0-9]+)\] .* -c .*(csrc/[^ ']*)'? -o .*|compiled \1 of \2: \3|p" \
  -e '/^ *!{80}/,/^ *!{80}/p' -e '/^(Collecting|Successfully installed)/p' || \
  { tail -n 60 $(VENV)/install.log; exit 1; }
PYTEST := PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-all docs sanitize wheels lint format check_format check_types clean \
        clean_venv

help: ## List the targets
	@sed -n 's/^\([a-z_-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/installed ## Let the model that comes along write, then train a small one
	$(BIN)/mblm demo

test: $(VENV)/installed-test ## Run the tests, slow ones aside
	$(PYTEST)

test-all: $(VENV)/installed-test ## Run all tests
	$(PYTEST) -m ''

docs: $(VENV)/installed-docs ## Build the site of docs/ and the API reference, in build/docs/site
	$(BIN)/python scripts/build_docs.py build/docs

sanitize: $(VENV)/installed-test ## Run decoding under sanitizers: address, undefined behavior, threads
	PATH="$(abspath $(BIN)):$$PATH" PYTHON="$(abspath $(BIN))/python" scripts/sanitize.sh

wheels: ## Fetch what scripts/gpu_check.sh takes to a machine without a network, into build/wheels
	$(PYTHON) scripts/gpu_check.py --fetch build/wheels

lint: $(VENV)/installed-dev ## Look for mistakes in Python
	$(BIN)/ruff check .

format: $(VENV)/installed-dev ## Format Python and C++
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

check_format: $(VENV)/installed-dev ## Fail where something is not formatted
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

check_types: $(VENV)/installed-dev ## Check types
	$(BIN)/mypy

clean: ## Remove what was built and cached, $(VENV) aside
	rm -rf build dist *.egg-info mblm/_C*.so mblm/_build.json $(VENV)/installed*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mblm tests -name __pycache__ -prune -exec rm -rf {} +

clean_venv: clean ## Remove $(VENV) too
	rm -rf $(VENV)

# First torch, then the package, which compiles against it.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	@$(INSTALL)
	touch $@

$(VENV)/installed-%: $(VENV)/torch $(SOURCES)
	@$(call INSTALL,[$*])
	touch $@

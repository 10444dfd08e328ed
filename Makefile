# Eight targets at most. `make demo` and `make test` need nothing but git, make and Python 3.11 to 3.13 with venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := requirements/constraints.txt
STAMP := $(VENV)/.installed
DEMO_STATE ?= .demo

.PHONY: help setup demo lab test check bench long
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
		|| grep -hE '^[a-z]+:.*## ' Makefile

setup: $(STAMP) ## Make .venv with pinned versions, without CUDA

$(STAMP): pyproject.toml $(CONSTRAINTS) requirements/install.py
	@PYTHON="$(PYTHON)" $(PYTHON) requirements/install.py "$(VENV)" "$(CONSTRAINTS)"
	@touch $@

demo: $(STAMP) ## Run the whole thing: two hospitals, private training through a remote kernel
	@$(BIN)/cloister demo --state "$(DEMO_STATE)" $(if $(UNSAFE),--unsafe-no-sandbox)

lab: $(STAMP) ## Open the demo in JupyterLab
	@$(BIN)/cloister demo --lab --state "$(DEMO_STATE)" $(if $(UNSAFE),--unsafe-no-sandbox)

test: check ## Everything: the checks, then the tests
	$(BIN)/python -m pytest

check: $(STAMP) ## Lint, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## Run every benchmark
	@found=0; for file in $$(grep -l __main__ tests/benchmarks/*.py 2>/dev/null); do \
		found=1; \
		$(BIN)/python -m "tests.benchmarks.$$(basename "$$file" .py)" || exit 1; \
	done; [ $$found = 1 ] || echo "There are no benchmarks yet."

long: $(STAMP) ## What takes hours: 500 kills on each database, 1000 kernels, every bit of signed evidence, an hour of fuzzing
	CLOISTER_KILLS=500 $(BIN)/python -m pytest tests/cloister_budget/test_crash.py
	CLOISTER_EXHAUSTIVE=1 $(BIN)/python -m pytest tests/cloister_attest/test_mutations.py
	CLOISTER_CYCLES=1000 $(BIN)/python -m pytest tests/cloister_kernel/sandbox/test_confined.py -k nothing_of
	$(BIN)/python -m tests.fuzz --seconds 3600

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.NOTPARALLEL:
.PHONY: help demo test lint docs bench clean

help:
	@echo 'make demo   train the quickstart recipe and write its report'
	@echo 'make test   run the tests'
	@echo 'make lint   ruff and mypy'
	@echo 'make docs   build the documentation into site/'
	@echo 'make bench  list the benchmarks and how to run each'
	@echo 'make clean  remove the environment and everything built'

demo: $(VENV)/.base
	$(BIN)/holdfast train quickstart --output runs/quickstart --overwrite
	@echo 'Open runs/quickstart/report.html in a browser.'

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.base
	@cat benchmarks/README.md
	@echo
	@echo 'Run one with: $(BIN)/python -m benchmarks.<name>.run'

clean:
	rm -rf $(VENV) site dist build runs/quickstart .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# The stamps below remember what is installed, so that a second run starts at once. An installed
# extra is installed again when the dependencies change.

$(VENV)/.torch: scripts/install_torch.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'Holdfast needs Python 3.11 or newer; $(PYTHON) is' \
	        "$$($(PYTHON) --version 2>&1). Name another with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install_torch.py
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -qq -e .
	@touch $@

$(VENV)/.test $(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: $(VENV)/.base
	$(BIN)/pip install -qq -e '.[$*]'
	@touch $@

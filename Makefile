# The two commands of a new user are `make demo` and `make test`; both make .venv when it is missing.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 13)))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/.installed
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo test test-slow test-slurm slurm-deps lint bench clean
help:
	@echo "make demo       install, prepare real text, train on 2 processes, evaluate, report (8 minutes on 2 cores)"
	@echo "make test       lint, types and tests (about 9 minutes on 2 cores)"
	@echo "make test-slow  the long suites: faults, splits of a batch, the wheel"
	@echo "make slurm-deps the packages slurm-wlm and munge, for a throw-away cluster in tests (root, Debian)"
	@echo "make test-slurm jobs, faults and restarts on that cluster; skipped where it is not installed"
	@echo "make bench      measurements; results are kept in benchmarks/results"
	@echo "make faults     110 kills at random moments; the record is kept in benchmarks/results"

install: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed, none was found on PATH"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: install
	$(BIN)/pretrain demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -m "not slow" -n 2 --no-loadscope-reorder

test-slow: install
	$(BIN)/pytest -m slow

slurm-deps:
	tests/slurm/cluster.sh install

test-slurm: install
	$(BIN)/pytest tests/slurm

bench: install
	$(BIN)/python -P -m benchmarks

faults: install
	$(BIN)/python -P -m benchmarks.faults

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache

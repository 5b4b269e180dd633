# demo  trains a small model on this machine and proves the result     test  the suite, but for its slow part
# check lint, format, types, architecture                              bench every benchmark, quick
# verify-all  the slow tests; every schedule, technique and pair of layouts against one device; writes docs/matrix.md
# Each makes .venv first if it is missing or older than pyproject.toml and constraints.txt.
# Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check bench verify-all
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/shardwise train examples/demo.toml --overwrite
	$(BIN)/shardwise verify examples/demo.toml --trained

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: $(STAMP)
	@set -e; for run in benchmarks/*/run.py; do \
	    [ -e "$$run" ] || continue; \
	    $(BIN)/python -m "benchmarks.$$(basename "$$(dirname "$$run")")" --quick; \
	done

verify-all: $(STAMP)
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m benchmarks.schedules.matrix --json benchmarks/schedules/results/matrix.json
	$(BIN)/python -m benchmarks.matrix --json benchmarks/matrix/results/matrix.json
	$(BIN)/python -m benchmarks.matrix.resume --json benchmarks/matrix/results/resume.json
	$(BIN)/python -m benchmarks.matrix.page

$(STAMP): pyproject.toml constraints.txt
	@echo "shardwise: preparing .venv (downloads happen here, and only here)"
	@start=$$(date +%s); set -e; \
	    [ -x $(BIN)/python ] || $(PYTHON) -m venv .venv; \
	    $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,hf]'; \
	    echo "shardwise: .venv ready, $$(( $$(date +%s) - start )) s for downloads and installation"
	@touch $@

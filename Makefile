# demo  trains a small model on this machine and proves the result     test  the suite, but for its slow part
# check lint, format, types, architecture                              bench every benchmark, quick
# verify-all  the slow tests; every schedule, technique and pair of layouts against one device; writes docs/matrix.md
# example  one of examples/ on real data, proven and scored: NAME=ner
# Each makes .venv first if it is missing or older than pyproject.toml and constraints.txt.
# Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo example test check bench verify-all
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/shardwise train examples/demo.toml --overwrite
	$(BIN)/shardwise verify examples/demo.toml --trained

# (DATA may be several paths, so one with spaces needs quotes of its own: DATA='"my data"')
# make example NAME=ner DATA=FOLDER    and, if wanted, RUN=another LAUNCHER=mpirun SET="training.steps=20 layout=dp=2"
example: $(STAMP)
	$(BIN)/python examples/run.py $(NAME) --verify $(if $(DATA),--data $(DATA)) $(if $(RUN),--run $(RUN)) \
	    $(if $(LAUNCHER),--launcher $(LAUNCHER)) $(foreach each,$(SET),--set "$(each)")

test: $(STAMP)
	@claims=$$(mktemp -d); second=; trap 'kill $$second 2> /dev/null; rm -rf $$claims' EXIT INT TERM; \
	$(BIN)/python -m pytest -p no:cacheprovider --claims=$$claims > $$claims/output 2>&1 & second=$$!; \
	$(BIN)/python -m pytest --claims=$$claims; first=$$?; \
	echo "shardwise: what a second process has run beside it"; wait $$second; status=$$?; second=; \
	cat $$claims/output; [ $$first = 0 ] && [ $$status = 0 ]

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
	$(BIN)/python -m benchmarks.fuzz

$(STAMP): pyproject.toml constraints.txt
	@echo "shardwise: preparing .venv (downloads happen here, and only here)"
	@start=$$(date +%s); set -e; \
	    [ -x $(BIN)/python ] || $(PYTHON) -m venv .venv; \
	    $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,hf,mpi]'; \
	    echo "shardwise: .venv ready, $$(( $$(date +%s) - start )) s for downloads and installation"
	@touch $@

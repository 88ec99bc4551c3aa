# make train | test | test-slow | bench | lint : each sets up .venv first if needed.
.PHONY: train test test-slow test-gpu bench lint setup clean
.DEFAULT_GOAL := help

# The first interpreter that is Python 3.12 or newer.
FIND_PYTHON = for p in $(PYTHON) python3.12 python3.13 python3.14 python3 $$HOME/.pyenv/versions/3.12*/bin/python $$HOME/.pyenv/versions/3.13*/bin/python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then echo $$p; break; fi; done
BIN := .venv/bin
STAMP := .venv/installed
TEST_STAMP := .venv/installed-test
# Processes of the fast tests; each keeps about one CPU busy.
WORKERS := 2
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

help:
	@echo "make train      train a small Hope language model on real text (CPU, a few minutes);"
	@echo "                again with ARGS=--resume or ARGS=--overwrite"
	@echo "make test       lint and the fast tests"
	@echo "make test-slow  the tests marked slow"
	@echo "make test-gpu   the tests of the kernels for an H100 or H200, on one"
	@echo "make bench      the benchmarks, as tables"
	@echo "make setup      only create .venv"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo "hope_jax needs Python 3.12 or newer; none found. Install it (for example: apt install python3.12 python3.12-venv, or pyenv install 3.12) or run: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || $$python -m venv .venv
	$(INSTALL) -e .
	@touch $@

# The compiler of TPU programs is among the test tools; it prints warnings wherever jax is imported without a TPU.
$(TEST_STAMP): $(STAMP)
	$(INSTALL) -e ".[test]"
	@touch $@

train: $(STAMP)
	$(BIN)/hope train tiny $(ARGS)

test: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(TEST_STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow and not gpu"

test-gpu: $(TEST_STAMP)
	$(INSTALL) -e ".[cuda13]"
	JAX_PLATFORMS=cuda,cpu $(BIN)/python -m pytest -m gpu

bench: $(STAMP)
	$(BIN)/python -m benchmarks

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs

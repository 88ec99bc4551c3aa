# make train | test | test-slow | bench | lint : each sets up .venv first if needed.
.PHONY: train test test-slow bench lint setup clean
.DEFAULT_GOAL := help

# The first interpreter that is Python 3.12 or newer.
FIND_PYTHON = for p in $(PYTHON) python3.12 python3.13 python3.14 python3 $$HOME/.pyenv/versions/3.12*/bin/python $$HOME/.pyenv/versions/3.13*/bin/python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then echo $$p; break; fi; done
BIN := .venv/bin
STAMP := .venv/installed

help:
	@echo "make train      train a small Hope language model on real text (CPU, a few minutes);"
	@echo "                again with ARGS=--resume or ARGS=--overwrite"
	@echo "make test       lint and the fast tests"
	@echo "make test-slow  the tests marked slow"
	@echo "make bench      the benchmarks, as tables"
	@echo "make setup      only create .venv"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo "hope_jax needs Python 3.12 or newer; none found. Install it (for example: apt install python3.12 python3.12-venv, or pyenv install 3.12) or run: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || $$python -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

train: $(STAMP)
	$(BIN)/hope train tiny $(ARGS)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

bench: $(STAMP)
	$(BIN)/python -m benchmarks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs

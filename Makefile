# `make run` (the main job) and `make test`; `make test-deploy` starts real SuperLinks, SuperNodes and Ray, and takes longer.
# All set up .venv/ when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-deploy check clean
.DEFAULT_GOAL := run

$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/.run

run: $(VENV)/.run
	$(BIN)/fedprune compare configs/quickstart.toml --out results/quickstart

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-deploy: $(VENV)/.test
	$(BIN)/python -m pytest -m "deploy or ray" -o faulthandler_timeout=400 -n 2 --dist worksteal tests/deploy tests/ray

clean:
	rm -rf $(VENV) results runs

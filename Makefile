# make run    the whole lifecycle: data to a gated, promoted, answering model
# make test   lint, types, floors, tests (slow ones: .ci/run)
# make bench  what the project promises about speed, measured here: one table
# make up     Prefect server, deployments, worker, MLflow and the API; make down stops them

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# RECIPE=recipes/mine.yaml runs another one than params.yaml names
RECIPE ?=

.PHONY: run test lint bench up down clean

run: .venv/.installed
	@$(BIN)/twinloop run $(RECIPE)

test: lint
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed
	@$(BIN)/python -m benchmarks $(RECIPE)

up: .venv/.installed
	@$(BIN)/python -m twinloop.flows.services up

down:
	@test ! -x $(BIN)/python || $(BIN)/python -m twinloop.flows.services down

# What a run made, and the environment. DVC's cache and the data stay: `git clean -fdX` removes those too.
clean: down
	rm -rf artifacts mlruns reports state .venv build *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "Twinloop needs Python 3.11: install it, or name it with \`make run PYTHON=/path/to/python3.11\`" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@mkdir -p .venv/src && ln -sfn ../.. .venv/src/twinloop
	@touch $@

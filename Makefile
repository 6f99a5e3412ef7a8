# make run    the whole lifecycle: data to a gated, promoted, answering model
# make test   lint, types, import layers, tests (slow ones: .ci/run)
# make bench  what the project promises about speed, measured here: one table
# make up     Prefect server, deployments, worker, MLflow and the API; make down stops them

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# RECIPE=recipes/mine.yaml runs another one than params.yaml names
RECIPE ?=

# The scripts of an environment, and its link to this code, hold the path that it was made at.
MADE_FOR := $(shell test -L .venv || grep -so '/.*/bin/python[0-9.]*' .venv/bin/twinloop | head -1)
ifneq ($(MADE_FOR),)
ifeq ($(shell test "$$(dirname "$(MADE_FOR)")" -ef .venv/bin && echo here),)
$(info .venv was made in another folder: it is made again)
$(shell rm -rf .venv)
endif
endif

.PHONY: run test lint bench up down clean

run: .venv/.installed
	@$(BIN)/twinloop run $(RECIPE)

test: lint
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

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

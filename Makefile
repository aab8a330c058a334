# Everything lives in .venv. `make run` and `make test` install first; both work on a fresh machine with Python 3.11+ and make. Recipes call what is in .venv by relative paths, and quote all others: a project's path may hold blanks.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
FIGURES := verdict|total_return|buy_and_hold|moving_average_cross|sharpe|max_drawdown|profit_factor|trades|deflated_sharpe|validation_score
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
# where .venv was made: its commands name that path, and a project that was moved needs them anew;
# where .venv is a link to another project's, only the link goes
MADE_AT := $(shell cat .venv/.installed 2>/dev/null)
MOVED := $(if $(MADE_AT),$(if $(filter-out x$(subst $() ,_,$(CURDIR)),x$(subst $() ,_,$(MADE_AT))),moved))

.PHONY: help install run portfolio check test experiments prove bench lab clean
.PHONY: moved

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

install: .venv/.installed  ## make .venv with everything that is needed

.venv/.installed: constraints.txt settings.ini setup.py pyproject.toml $(MOVED)
	@[ -z "$(MOVED)" ] || [ ! -L .venv ] || rm .venv; rm -f $@; if [ -n "$(MOVED)" ] || ! $(BIN)/python -c "$(NEW_ENOUGH)" 2>/dev/null; then \
		"$(PYTHON)" -c "$(NEW_ENOUGH)" 2>/dev/null || { echo "trading_lib needs Python 3.11 or newer, found $$("$(PYTHON)" --version 2>/dev/null || echo none) as $(PYTHON); name another, such as: make $(firstword $(MAKECMDGOALS) run) PYTHON=python3.12" >&2; exit 1; }; \
		echo '$(PYTHON) -m venv --clear .venv'; "$(PYTHON)" -m venv --clear .venv; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@if [ -e .git ]; then git config --local include.path ../.gitconfig || true; fi
	@pwd -P > $@

run: install  ## train and backtest as params.yaml says; does nothing when nothing changed
	@if git rev-parse --git-dir >/dev/null 2>&1; then ! grep -qs no_scm .dvc/config.local || $(BIN)/dvc config --local --unset core.no_scm; else $(BIN)/dvc config --local core.no_scm true; fi  # no git: unpacked from an archive
	@$(BIN)/trading-lib data find >/dev/null
	$(BIN)/dvc repro
	@$(BIN)/trading-lib verdict

portfolio: install  ## train, test and report the universes of params.yaml: one account over many assets
	@if grep -qE '^  universes: *\[\]' params.yaml; then echo 'params.yaml: portfolio.universes was empty, is [simulated] now'; \
		sed -E 's/^(  universes: *)\[\] {0,9}/\1[simulated]/' params.yaml > params.yaml.new && mv params.yaml.new params.yaml; fi
	$(BIN)/dvc repro portfolio/dvc.yaml

check: install  ## export, format, lint, and the fast tests of the chapters that changed; up to 3 minutes
	$(BIN)/ruff format --quiet .
	$(BIN)/nbdev_export
	$(BIN)/trading-lib settings --write
	$(BIN)/nbdev_clean
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile -m 'not proof and not slow' $$($(BIN)/python tests/changed.py)

test: install  ## all tests: notebooks and pytest, two at a time; about 20 minutes on two cores
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/pytest -n 2 --dist loadfile  # two processes, each takes whole files: a module's fixtures are made once

experiments: install  ## what was tried with dvc exp run: the figures, and the settings that differ
	@$(BIN)/dvc exp show --no-pager --only-changed --drop '(?!reports/[^:]*:)[^:]*/|ledger$$' --keep '(.*:)?($(FIGURES))$$'

prove: install  ## the heavy end-to-end proofs, about an hour on two cores
	$(BIN)/pytest -m proof -s

bench: install  ## every benchmark, beside its peers where there are any; minutes each
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	for file in benchmarks/[!_]*.py; do grep -q '__main__' $$file || continue; echo "== $$file"; OMP_NUM_THREADS=1 $(BIN)/python $$file; done

lab: install  ## JupyterLab, with the hook that saves stage notebooks without outputs
	JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter" $(BIN)/jupyter lab$(if $(filter 0,$(shell id -u)), --allow-root)

clean:  ## remove what the pipeline made; .venv and your own files in data/raw stay
	rm -rf models/*.pt models/*_deploy.zip models/folds models/runs/*.ipynb data/*.parquet data/*.npz data/own_files dvc.lock portfolio/dvc.lock
	find reports -mindepth 1 -maxdepth 1 -type d ! -name proofs -exec rm -rf {} +

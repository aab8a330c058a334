# Everything lives in .venv. `make run` and `make test` install first; both work on a fresh machine with Python 3.11+, make and git.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install run test prove bench lab clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

install: .venv/.installed  ## make .venv with everything that is needed

.venv/.installed: constraints.txt settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@git rev-parse --git-dir >/dev/null 2>&1 && git config --local include.path ../.gitconfig || true
	@touch $@

run: install  ## train and backtest as params.yaml says; does nothing when nothing changed
	$(BIN)/dvc repro
	@$(BIN)/trading-lib verdict

test: install  ## all tests: notebooks and pytest, two at a time; about 20 minutes on two cores
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/pytest -n 2 --dist loadfile  # two processes, each takes whole files: a module's fixtures are made once

prove: install  ## the heavy end-to-end proofs, about an hour on two cores
	$(BIN)/pytest -m proof -s

bench: install  ## every benchmark, beside its peers where there are any; minutes each
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	for file in benchmarks/[!_]*.py; do grep -q '__main__' $$file || continue; echo "== $$file"; OMP_NUM_THREADS=1 $(BIN)/python $$file; done

lab: install  ## JupyterLab, with the hook that saves stage notebooks without outputs
	JUPYTER_CONFIG_PATH=$(CURDIR)/.jupyter $(BIN)/jupyter lab

clean:  ## remove what the pipeline made; .venv and your own files in data/raw stay
	rm -rf models/*.pt models/*_deploy.zip models/folds models/runs/*.ipynb data/*.parquet data/*.npz dvc.lock
	find reports -mindepth 1 -maxdepth 1 -type d ! -name proofs -exec rm -rf {} +

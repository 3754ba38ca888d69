# The environment is .venv; `make help` lists the targets.
PYTHON ?= python3
RUN := .venv/bin/python

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/ready  ## make .venv with gymexp and all it needs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gymexp needs Python >= 3.11: make PYTHON=…")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch .venv/ready

demo: setup  ## train the tiny policy in two environments, on a CPU in minutes
	$(RUN) -m gymexp.train experiment=quickstart

test: setup  ## every test that this machine can run, except those of test-more and test-faults
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not ranks and not vllm and not ray and not slurm and not fault'

test-more: setup  ## tests with the real vLLM on a CPU, several ranks, a Slurm cluster or `gym env start`
	$(RUN) -m pytest -m '(ranks or vllm or ray or slurm) and not fault'

test-faults: setup  ## inject every fault of docs/reliability.md into whole runs, and print the seconds of each
	$(RUN) -m pytest tests/faults

lint: setup  ## ruff and pyright
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

format: setup  ## rewrite the sources in the project's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove .venv and the files of tests and tools; outputs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist

.PHONY: help setup demo test test-more test-faults lint format clean

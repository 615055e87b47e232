# One command each. The first one makes .venv from constraints.txt; later ones start at once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test drills lint bench clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LOG := .venv/install.log

# The models are small: more threads than one only make them slower, and results the same everywhere.
export OMP_NUM_THREADS ?= 1

help: ## list the commands
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: .venv/installed ## install everything into .venv

.venv/installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	@echo "Installing into .venv (once, a few minutes)"
	@"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --no-input -c constraints.txt -e '.[dev]' 2>&1 | tee $(LOG) | awk ' \
	  /^Collecting/ { printf "\r  %3d collected: %-40.40s", ++n, $$2; fflush() } \
	  /^Installing collected/ && n > 1 { printf "\r  %3d collected, unpacking %20s\n", n, ""; fflush() }' \
	  || { echo; tail -n 20 $(LOG); echo "The installation failed; all of its output is in $(LOG)"; exit 1; }
	@touch $@

demo: setup ## four hospitals learn together, with results in runs/
	@$(BIN)/grandrounds simulate heart --seeds 0,1,2,3,4

test: setup ## run the tests, drills left out
	@if [ "$$(id -u)" = 0 ] && [ -w /dev/net/tun ]; then \
	  $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not drill"; \
	else \
	  $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not drill and not machine"; \
	  echo "NOT TESTED: what needs root and network namespaces (python -m pytest -m machine)"; \
	fi
	@echo "NOT TESTED: what becomes of a study when everything breaks, which takes a quarter of an hour (make drills)"

drills: setup ## break a deployment in every way that the tests know
	@$(BIN)/python -m pytest -m drill

lint: setup ## check style, types and images
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/hadolint deploy/Dockerfile

bench: setup ## time rounds, the boundary, the ensemble and a private step
	@missed=0; for what in rounds boundary aggregation private_step; do \
	  $(BIN)/python -m simulations.benchmarks.$$what || missed=1; \
	done; exit $$missed

clean: ## remove what was installed and cached; results in runs/ stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

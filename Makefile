# `make check` is what a commit must pass. PYTHON=... chooses another interpreter.
PYTHON ?= python

.PHONY: check format lint types imports test

check: lint types imports test

format:  ## rewrite the layout, and what ruff can mend
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

imports:
	lint-imports --no-logo

test:
	$(PYTHON) -m pytest -n 2

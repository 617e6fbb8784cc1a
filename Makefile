# `make check` is what a commit must pass, in the environment that is active.

.PHONY: check format lint types imports quick test

check: lint types imports test

format:  ## rewrite the layout, and what ruff can mend
	python -m ruff format .
	python -m ruff check --fix .

lint:
	python -m ruff format --check .
	python -m ruff check .

types:
	python -m mypy

imports:
	lint-imports --no-logo

quick:  ## the change at hand: layout, lint, and the tests that are fast, in a minute and a half
	python -m ruff format --check .
	python -m ruff check .
	python -m pytest -n 2 -q -m "not slow"

test:  ## everything, in ten minutes on two cores
	python -m pytest -n 2

# `make check` is what a commit must pass, in the environment that is active.

.PHONY: check format lint types imports test

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

test:
	python -m pytest -n 2

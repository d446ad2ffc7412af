# Everything a developer runs. `make help` lists it.
#   PYTHON=python3.13   the interpreter for the virtual environments (3.11 or newer)
#   ARGS="-k sweep -x"  more arguments for pytest in `make test`
#   ROUNDS=200          rounds of `make chaos`

PYTHON ?= python3
ARGS ?=
ROUNDS ?= 50

VENV := .venv
DEMO_VENV := .venv-demo
PIP := python -m pip install --quiet --disable-pip-version-check

# Two of these at once would run two installations into the same environment.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test check bench chaos clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_VENV)/.installed  ## show a batch that survives a crash, without any server
	$(DEMO_VENV)/bin/python -m examples.annotations.demo

test: $(VENV)/.installed  ## run the test suite (ARGS="-k name" to choose)
ifeq ($(strip $(ARGS)),)
	$(VENV)/bin/python -m tests
else
	$(VENV)/bin/python -m pytest -q $(ARGS)
endif

check: $(VENV)/.installed-dev  ## lint, strict types, layering
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m mypy --strict celery_batchtrack examples
	$(VENV)/bin/python -m pytest -q tests/unit -k layer

bench: $(VENV)/.installed  ## measure the overhead on this machine
	$(VENV)/bin/python -m tests.bench

chaos: $(VENV)/.installed  ## random faults for long (ROUNDS=50)
	$(VENV)/bin/python -m pytest tests/chaos -q --chaos-rounds=$(ROUNDS)

clean:  ## remove environments, caches, build and demo output
	rm -rf $(VENV) $(DEMO_VENV) build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache
	rm -rf batchtrack.db* batchtrack-broker
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	$(VENV)/bin/$(PIP) --editable '.[all]' --group test
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(VENV)/bin/$(PIP) --group dev
	touch $@

$(DEMO_VENV)/.installed: pyproject.toml $(DEMO_VENV)/.created
	$(DEMO_VENV)/bin/$(PIP) --editable '.[progress]'
	touch $@

# An interpreter needs `venv` and `ensurepip` too, which some distributions package apart.
%/.created:
	@for candidate in $(PYTHON) python3.13 python3.12 python3.11; do \
	    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "creating $* with $$($$candidate --version)"; \
	        $$candidate -m venv --clear $* && exit 0 || exit 1; \
	    fi; \
	    echo "$$candidate is missing, older than Python 3.11, or without venv: trying the next" >&2; \
	done; \
	echo "no Python 3.11 or newer found: name one with make PYTHON=/path/to/python3" >&2; exit 1
	@$*/bin/$(PIP) --upgrade 'pip>=25.1'  # the first to know --group
	@touch $@

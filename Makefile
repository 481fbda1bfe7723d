# nbkit: `make quickstart` fine-tunes a real model, `make test` runs the tests; both install what they need, once.
# `make help` lists the rest. On a machine without an NVIDIA GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu
# fetches the small CPU build of torch instead of the CUDA one.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/setup.stamp
TORCH_INDEX :=
JOBS := 2
# torch's threads spin while they wait; beside another busy process that makes a step many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test lab notebooks lint slow fuzz wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## the install alone: .venv with the pinned set

# Made again only when the dependencies change. Any Python from 3.11 that can make a venv will do.
$(STAMP): pyproject.toml constraints/cpu.txt
	@for python in python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "nbkit needs Python 3.11 or newer with venv and pip (Debian: apt install python3-venv)." >&2; exit 1; fi; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then echo "== making $(VENV) with $$($$found --version)"; $$found -m venv --clear $(VENV); fi
	@echo "== installing the pinned set (a few minutes the first time)"
	@if [ -n "$(TORCH_INDEX)" ]; then $(PY) -m pip install -c constraints/cpu.txt --index-url $(TORCH_INDEX) torch; fi
	$(PY) -m pip install --disable-pip-version-check -c constraints/cpu.txt -e ".[dev]"
	@touch $(STAMP) && echo "== installed; $(PY) is ready"

quickstart: $(STAMP)  ## fine-tune SmolLM2-135M on this machine: runs the quickstart notebook, writes build/, prints the figures
	$(PY) -m nbkit fetch smollm2-135m-instruct
	$(PY) notebooks/run.py notebooks/quickstart.ipynb

test: $(STAMP)  ## the test suite, at most 10 minutes on 2 cores
	$(PY) -m pytest -n $(JOBS) -m "not slow and not gpu and not network"

lab: $(STAMP)  ## JupyterLab, opened at the quickstart
	$(PY) -m jupyterlab notebooks/quickstart.ipynb

notebooks: $(STAMP)  ## every notebook from top to bottom, under nbmake
	$(PY) -m pytest --nbmake --nbmake-timeout=900 notebooks

lint: $(STAMP)  ## ruff, pyright, import contracts
	$(PY) -m ruff check .
	$(PY) -m pyright
	$(VENV)/bin/lint-imports --no-cache

slow: $(STAMP)  ## what takes long: notebooks, wheel, browser, Colab's versions, package index
	$(PY) -m pytest -m "slow and not gpu" --durations=15 -ra

fuzz: $(STAMP)  ## the property tests with fifty times as many examples
	$(PY) -m pytest -p tests.fuzz -n $(JOBS) -m "hypothesis and not gpu and not network"

wheel: $(STAMP)  ## dist/nbkit_llm-*.whl
	$(PY) -m build --wheel --outdir dist .

clean:  ## removes what was built; keeps .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

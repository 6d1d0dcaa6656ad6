# `make book` and `make test` set everything up by themselves: they need Python >= 3.11, git and make.
# PYTHON=python3.12 chooses the interpreter; pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) reach pip.
PYTHON ?= python3
PYTEST_FLAGS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile
override VENV := .venv
override PY := $(VENV)/bin/python
override READY := $(VENV)/.ready
override CHAPTERS := build/chapters
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

# The stamp holds the path it was made for: a checkout that was moved or copied has scripts that point elsewhere.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

.DEFAULT_GOAL := help
.PHONY: help ready book test slow lint types chapters quick bench clean
.DELETE_ON_ERROR:
# Cells and tests see this environment alone.
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

ready: $(READY) ## set up .venv: pinned packages, sdecor itself, the notebook kernel

# Without its stamp an environment is unfinished, and made from nothing; with it, only what changed is installed.
# Nothing is compiled ahead: Python does that for the few modules in use, which saves a minute.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"sdecor needs Python >= 3.11, and $(PYTHON) is {sys.version.split()[0]}: try make PYTHON=python3.12")'
	@if [ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ]; then rm $@; else echo "Setting up $(VENV): a few minutes, once."; rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); fi
	$(PY) -m pip install -qq --no-compile -c constraints.txt pip setuptools
	$(PY) -m pip install -qq --no-compile --no-build-isolation -c constraints.txt -e '.[book,test]'
	$(PY) -m ipykernel install --prefix $(VENV) --name python3 --display-name 'Python 3' >/dev/null
	@echo "$(CURDIR)" > $@

book: $(READY) ## build the site into _build/html, warnings as errors
	rm -rf _build
	$(VENV)/bin/jupyter-book build . --quiet -W -n --keep-going
	@echo "The book is in _build/html/index.html"

test: $(READY) ## run the tests, but for the slow ones
	$(PY) -m pytest -m "not slow" $(PYTEST_FLAGS)

slow: $(READY) ## run the slow tests: the published chapters again, accessibility of all pages, an empty environment
	$(PY) -m pytest -m slow --durations=5 $(PYTEST_FLAGS) --dist=load

# The cells are read from the sources, as notebooks, since that is what ruff knows.
lint: $(READY) ## check style and format of the modules, the tests and the cells of the chapters
	@rm -rf $(CHAPTERS) && mkdir -p $(CHAPTERS)
	@tar -cf - $$(grep -rl --include='*.md' '^jupytext:' book) | tar -xf - -C $(CHAPTERS)
	@find $(CHAPTERS) -name '*.md' -exec $(PY) -m jupytext --quiet --to ipynb {} +
	$(PY) -m ruff check sdecor book/tools tests $(CHAPTERS)
	$(PY) -m ruff format --check sdecor book/tools tests $(CHAPTERS)

types: $(READY) ## check types, strictly
	$(PY) -m mypy

chapters: $(READY) ## run again the chapters whose source changed
	$(PY) -m sdecor_book --stale

# JOBS at a time, as many as there are cores up to four; what a chapter says is shown if it fails.
quick: $(READY) ## run every chapter that takes parameters at preset "quick", and say how long each took
	@start=$$(date +%s); grep -rlE --include='*.md' '^:?tags: \[parameters' book | sed 's,^book/,,; s,\.md$$,,' | sort | \
	  OMP_NUM_THREADS=1 xargs -n 1 -P $(JOBS) sh -c 'start=$$(date +%s); \
	    said=$$($(PY) -m sdecor_book $$1 -p preset quick --out build/quick/$$1.ipynb 2>&1) || { echo "$$1 failed: $$said"; exit 1; }; \
	    echo "$$1: $$(($$(date +%s) - start)) s"' quick; \
	code=$$?; echo "All chapters, $(JOBS) at a time: $$(($$(date +%s) - start)) s"; exit $$code

# SHORT=1 takes one round of small batches, to see that all run.
bench: $(READY) ## measure what a training step, an attribution and a measure cost
	$(PY) tests/benchmarks/run.py $(if $(SHORT),--rounds=1 --repeat=1 --batch-size=32)
	$(PY) tests/benchmarks/attributions.py $(if $(SHORT),--rounds=1 --images=2 --samples=300 --size=16)
	$(PY) tests/benchmarks/measures.py $(if $(SHORT),--rounds=1 --images=8 --maps=10 --table=20)

clean: ## remove what the targets made, the environment included
	rm -rf $(VENV) _build build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

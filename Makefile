# make            what can be done here
# make setup      .venv with everything, at the tested versions

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run test support lint format constraints clean
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What `make run` takes. Set on make's command line; a variable of the same name in the environment is not read.
PROMPT := a sunset over green mountains with a lake and pine trees
DEVICES := 2
MODEL := demo
PLAN :=
SIZE :=
STEPS :=
GUIDANCE :=
SEED :=
OUT :=
COMPARE :=
# What `make test` takes: files, or a test's address; and the number of processes that share the tests.
TESTS :=
JOBS := 2

# Text goes to the shell through its environment, never through the recipe: quotes, $ and ; in a prompt stay what they are.
override export PROMPT := $(value PROMPT)
override export OUT := $(value OUT)

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  make run PROMPT="a red sunrise over a lake" DEVICES=2 [COMPARE=1] [PLAN=patch2.displaced.w4] [SIZE=384x256]'
	@echo '           [STEPS=30] [GUIDANCE=5] [SEED=7] [OUT=out.png] [MODEL=demo-dit]'
	@echo '  make test [TESTS=tests/...] [JOBS=2]   other Python: PYTHON=python3.12 (for a new .venv)'

setup: $(STAMP) ## create .venv and install; does nothing when nothing changed

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

run: setup ## draw PROMPT with MODEL on DEVICES processes
	@$(BIN)/distrifusion run '$(MODEL)' --prompt="$$PROMPT" --devices='$(DEVICES)' \
	$(if $(PLAN),--plan='$(PLAN)') $(if $(SIZE),--size='$(SIZE)') $(if $(STEPS),--steps='$(STEPS)') \
	$(if $(GUIDANCE),--guidance='$(GUIDANCE)') $(if $(SEED),--seed='$(SEED)') \
	$${OUT:+-o "$$OUT"} $(if $(filter-out 0,$(COMPARE)),--compare)

test: setup ## set up and pass the tests
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(TESTS)

support: setup ## pass the tests and write what they prove to support.json and docs/support.md
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --write-support

lint: setup ## rules, format, types and the tables of measurements, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python benchmarks/tables.py --check

format: setup ## rewrite to the format, with the safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

constraints: setup ## write what .venv holds to constraints.txt, after an upgrade that was tested
	{ sed '/^[^#]/d' constraints.txt; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//'; \
	} > constraints.new
	mv constraints.new constraints.txt

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

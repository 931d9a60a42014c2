# make train, make test: each creates the environment it needs, then runs. `make help` lists the rest.
#
#   ARGS="..."             flags passed on to train.py, pytest or the benchmark
#   PYTHON=/path/python    the interpreter to make the environment with (default: the first >= 3.11 found)
#   ACCELERATOR=cuda|tpu   install jax's build for it (default: the CPU build)
#   JOBS=2                 test processes
#   VENV=.venv             where the environment lies

VENV ?= .venv
JOBS ?= 2
export JOBS
ARGS ?=
ACCELERATOR ?=
REPOSITORY ?=
BIN := $(VENV)/bin
comma := ,
NOTEBOOKS := $(patsubst %.py,%.ipynb,$(wildcard notebooks/*.py))
suffix := $(if $(ACCELERATOR),-$(ACCELERATOR))
extras = $(1)$(if $(ACCELERATOR),$(comma)$(ACCELERATOR))
# Python 3.11 has pins of its own: jax 0.11 and later need 3.12.
pins = constraints/python$$($(BIN)/python -c 'import sys; print("3.11" if sys.version_info < (3, 12) else "3.12")').txt
install = @echo "Installing $(1) into $(VENV) (minutes the first time)" && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(call extras,$(1))]" --constraint $(pins)

export PYTHON

.PHONY: help train test lint bench notebooks docs portability compiled pins clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: $(VENV)/.train$(suffix) ## train the quickstart, or what ARGS names: make train ARGS="mqar --train.steps 500"
	@$(BIN)/python train.py $(ARGS)

test: $(VENV)/.test$(suffix) lint $(NOTEBOOKS) ## lint, walls, laws, doctests and the notebooks
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --nbmake $(NOTEBOOKS) tests effattn_jax $(ARGS)

lint: $(VENV)/.test$(suffix) ## ruff, and the walls between the rooms
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/lint-imports

bench: $(VENV)/.test$(suffix) ## time and compiled memory of every mixer against jax.nn
	@$(BIN)/python -m benchmarks.attention $(ARGS)

notebooks: $(NOTEBOOKS) ## build the .ipynb files; REPOSITORY=owner/name makes their Colab badges open them

notebooks/%.ipynb: notebooks/%.py scripts/notebook.py | $(VENV)/.test$(suffix)
	@$(BIN)/python scripts/notebook.py $< $@ $(REPOSITORY)

docs: $(VENV)/.docs$(suffix) docs/transformations.md ## the documentation, into docs/_build/html; a warning is an error
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs/transformations.md: | $(VENV)/.test$(suffix)
	@$(BIN)/python -m tests.laws.table

portability: $(VENV)/.test$(suffix) ## kernels, optimizers and quickstart on Colab's jax 0.7.2 (Python 3.13) and on jax 0.12 (Python 3.12)
	@$(BIN)/python scripts/portability.py $(ARGS)

compiled: $(VENV)/.test$(suffix) ## every mixer compiled for an accelerator that is not here: ACCELERATOR=tpu VENV=.venv-tpu, or cuda
	@$(BIN)/python -m benchmarks.compiled $(ACCELERATOR) $(ARGS)

pins: $(VENV)/.docs$(suffix) ## print the pins of this environment, as constraints/ holds them
	@$(BIN)/python scripts/pin.py

clean: ## remove caches and what was built; environments and runs stay
	rm -rf build dist docs/_build docs/_generated .cache .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# A stamp a kind of environment: it is newer than what it was made from, so a second run installs nothing.

$(VENV)/.created:
	@python=$$(scripts/find_python.sh) && echo "Creating $(VENV) with $$python" && "$$python" -m venv $(VENV)
	@touch $@

$(VENV)/.train$(suffix): $(VENV)/.created pyproject.toml $(wildcard constraints/*.txt)
	$(call install,train)
	@touch $@

$(VENV)/.test$(suffix): $(VENV)/.created pyproject.toml $(wildcard constraints/*.txt)
	$(call install,test)
	@touch $(VENV)/.train$(suffix) $@

$(VENV)/.docs$(suffix): $(VENV)/.test$(suffix)
	$(call install,docs)
	@touch $@

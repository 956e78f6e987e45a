# Lethe. `make bench METHOD=uniforget` and `make test` set everything up on first use.
PYTHON   ?= python3.11
VENV     ?= .venv
METHOD   ?=
MODEL    ?=
SUITE    ?= planted
STRENGTH ?= all
ENGINE   ?= local
RUNS     ?= runs
SITE     ?= site
THREADS  ?= 0
WORKERS  ?= 1
JOBS     ?= auto
SET      ?=
ARGS     ?=
ROW      ?=
ATTACK   ?=

LETHE  = $(VENV)/bin/lethe
SETUP  = $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup bench attack test leaderboard check metrics models lint format clean
.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(SETUP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: give a Python 3.11 or newer as PYTHON=..."; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(SETUP) ## Install Lethe and all it needs into .venv

bench: $(SETUP) ## Run a method: METHOD=uniforget [SUITE=planted] [STRENGTH=all] [MODEL=] [SET='k=v'] [ARGS=--plan]
	@test -n "$(METHOD)" -o "$(SUITE)" != planted || { echo "make: say which method: make bench METHOD=uniforget"; exit 2; }
	$(LETHE) bench $(if $(METHOD),"$(METHOD)") --suite "$(SUITE)" --strength "$(STRENGTH)" --engine $(ENGINE) --runs "$(RUNS)" --site "$(SITE)" --threads $(THREADS) --workers $(WORKERS) $(if $(MODEL),--model "$(MODEL)") $(foreach s,$(SET),--set "$(s)") $(ARGS)

attack: $(SETUP) ## Is memorization gone or only hidden? ROW=uniforget/strong (or METHOD, all) [ATTACK=dori]
	@test -n "$(ROW)" || { echo "make: say which row: make attack ROW=uniforget/strong"; exit 2; }
	$(LETHE) attack "$(ROW)" --suite "$(SUITE)" --engine $(ENGINE) --runs "$(RUNS)" --site "$(SITE)" --threads $(THREADS) --workers $(WORKERS) $(if $(MODEL),--model "$(MODEL)") $(foreach a,$(ATTACK),--attack "$(a)")

test: $(SETUP) ## Run the tests, JOBS processes at a time (auto: a physical core each)
	$(VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile

leaderboard: $(SETUP) ## Write site/index.html from the results in RUNS
	$(LETHE) leaderboard --runs "$(RUNS)" --out "$(SITE)"

check: $(SETUP) ## Run the contract suite on a method or a metric: METHOD=./my_method.py:MyMethod
	@test -n "$(METHOD)" || { echo "make: say which method: make check METHOD=uniforget"; exit 2; }
	$(LETHE) check "$(METHOD)"

metrics: $(SETUP) ## Measure the metrics against the planted truth, and write the page
	$(LETHE) metrics --runs "$(RUNS)" --threads $(THREADS)
	$(LETHE) leaderboard --runs "$(RUNS)" --out "$(SITE)"

models: $(SETUP) ## Train the built-in models from nothing (resumes where it was stopped)
	$(LETHE) train --threads $(THREADS) --sheets docs

lint: $(SETUP) ## Lint, format check and strict type check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(SETUP) ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove the environment and build products (not the results)
	rm -rf $(VENV) build *.egg-info benchmark/*.egg-info

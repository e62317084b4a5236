# Eyas: `make` shows what there is.

VENV    := .venv
PYTHON  ?= python3
BIN     := $(VENV)/bin
RECIPE  ?= models/solar-cells/recipe.toml
TORCH   ?= cuda
STAMP   := $(VENV)/.installed-$(TORCH)
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PYTEST_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help install distill test check format bench-main-job system-deps clean

help: ## show this
	@echo "Eyas: from a folder of labelled pictures to a classifier on a fleet of cameras"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  RECIPE=path   the recipe of distill (default $(RECIPE))"
	@echo "  TORCH=cpu     install the CPU build of torch, where its index can be reached"

install: $(STAMP) ## the virtual environment with everything in it; quick when nothing changed

# uv is installed by pip and installs the rest: pip may pick a torch wheel that torchvision does not fit.
$(STAMP): pyproject.toml constraints/host.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --constraint constraints/host.txt \
		$(if $(filter cpu,$(TORCH)),--torch-backend=cpu) --editable '.[host,demo,dev]'
	@touch $@

distill: install ## the main job: pictures -> teacher -> student -> int8 -> verified bundle and report
	$(BIN)/eyas distill $(RECIPE)

test: install ## all tests
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: install ## ruff, mypy strict, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/device/test_layering.py

format: install ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-main-job: install ## time and score the main job over three seeds (about an hour)
	$(BIN)/python benchmarks/main_job.py --json benchmarks/results/main-job.json

system-deps: ## what tests need from the system (apt): a real MQTT broker
	@command -v mosquitto >/dev/null || test -x /usr/sbin/mosquitto || \
		( $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends mosquitto )

clean: ## remove the virtual environment, runs and caches
	rm -rf $(VENV) runs dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

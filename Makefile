# make demo and make test are all that is needed; both set the environment up first.
#   make setup CUDA=1      SGLang's CUDA packages instead of the CPU list
#   make test-unit         what needs no process, browser or server: the inner loop
#   make test-fast         without the tests that start SGLang or take long
#   make demo ARGS="..."   flags of `aurora-sgl demo`

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
KIND   := $(if $(filter 1 yes true,$(CUDA)),cuda,cpu)
# An environment that exists keeps its kind: `make test` after `make setup CUDA=1` stays on CUDA.
ifeq ($(origin CUDA),undefined)
KIND   := $(if $(wildcard $(VENV)/.ready-cuda),cuda,cpu)
endif
STAMP  := $(VENV)/.ready-$(KIND)

.PHONY: setup demo test test-unit test-fast lint format clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^#//p' Makefile | head -5
	@echo "   targets: setup demo test test-unit test-fast lint format clean"

setup: $(STAMP)
	@:

$(STAMP): requirements/cpu.lock pyproject.toml tools/setup_env.py
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) not found; install Python 3.11 or say make PYTHON=..." >&2; exit 1; }
	@rm -f $(VENV)/.ready-*
	@$(PYTHON) tools/setup_env.py --stamp $(STAMP) $(if $(filter cuda,$(KIND)),--cuda)

demo: $(STAMP)
	@$(BIN)/aurora-sgl demo $(ARGS)

# Hundreds of processes start here: each would compile our modules anew.
test test-unit test-fast: export PYTHONDONTWRITEBYTECODE :=

# Two processes: the tests that share running servers in one, the others in the other.
test: $(STAMP)
	@$(BIN)/python -m pytest -n 2 --durations=20 $(ARGS)

# The inner loop: nothing that starts a process, a browser or a server.
test-unit: $(STAMP)
	@$(BIN)/python -m pytest tests/unit -n 2 -m "not (engine or browser or process or slow or gpu)" $(ARGS)

# Also PostgreSQL, processes of ours and pages; no SGLang, nothing that takes long.
test-fast: $(STAMP)
	@$(BIN)/python -m pytest -n 2 -m "not (engine or slow or gpu)" $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/python tools/import_graph.py
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# The data folder aurora-data is left alone: it holds what was recorded and trained.
clean:
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

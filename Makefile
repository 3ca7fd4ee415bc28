# The two commands of a newcomer are `make demo` and `make test`; `make ui` opens the web UI on the demo's instance.
# Recipes use paths relative to this folder, so that a checkout under a path with spaces works.

PYTHON ?= python3
# Where the demo keeps its store, jobs and Dagster instance.
KD_HOME ?= $(CURDIR)/var
override KD_HOME := $(shell realpath --canonicalize-missing -- "$(KD_HOME)")
PORT ?= 3000
export KD_HOME
# Idle OpenMP threads sleep: see slurm/task.sbatch.
export OMP_WAIT_POLICY ?= PASSIVE
export DAGSTER_HOME = $(KD_HOME)/dagster

BIN = .venv/bin
READY = .venv/.ready

.PHONY: setup demo ui test check clean

setup: $(READY)

# torch first and alone: its pinned build must be chosen before anything else asks for "any torch".
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kd_assets needs Python 3.11 or newer; found $$($(PYTHON) --version). Say which: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "this Python has no venv: apt-get install python3-venv" >&2; exit 2; }
	@echo "Installing into .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[control,compute,dev]'
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python -W ignore -m kd_assets.demo.run

ui: $(READY)
	@mkdir -p "$(DAGSTER_HOME)" && cp dagster.yaml "$(DAGSTER_HOME)/dagster.yaml"
	@echo "Dagster on http://127.0.0.1:$(PORT) (Ctrl-C ends it)"
	@exec $(BIN)/python -W ignore -m dagster dev --workspace workspace.yaml --host 127.0.0.1 --port $(PORT)

check: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

test: check
	@.ci/install-slurm
	@$(BIN)/python -m pytest -m "not slurm" --numprocesses 2 --dist loadfile $(PYTEST_ARGS) || [ $$? = 5 ]
# These wait more than they compute, each file on a cluster of its own. (Status 5: PYTEST_ARGS chose no test of these.)
	@$(BIN)/python -m pytest -m slurm --numprocesses 4 --dist loadfile $(PYTEST_ARGS) || [ $$? = 5 ]

clean:
	rm -rf .venv

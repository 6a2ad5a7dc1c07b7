# Every target makes .venv on first use, and again when pyproject.toml or constraints.txt change.
# Other interpreter: make PYTHON=python3.12. Some tests only: make test ARGS="-m 'not slow'".

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# Tests and demo are meant for two cores; torchrun warns when this is unset.
export OMP_NUM_THREADS ?= 2

.PHONY: help demo test machines mutations proof examples bench bench-gpu gpu lint clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## train the tiny model on a CPU
	@$(BIN)/tune run --nproc_per_node 1 recipes/grpo.py --config recipes/configs/tiny_cpu.yaml

test: $(INSTALLED) ## run the tests and the examples in the docstrings
	@$(BIN)/pytest -n 2 --dist worksteal $(ARGS)

machines: $(INSTALLED) ## test runs of several processes, processes that die, disks that fill
	@$(BIN)/pytest -m "machines and not proof" -n 2 --dist worksteal $(ARGS)

mutations: $(INSTALLED) ## make known faults on purpose, and print which test finds each
	@$(BIN)/python -m tests.mutations

proof: mutations ## what takes long: the mutations, 10,000 random cases, a run killed 20 times, 500 steps watched
	@FUZZ_CASES=10000 $(BIN)/pytest tests/test_fuzz.py
	@$(BIN)/pytest -m proof

examples: $(INSTALLED) ## run what examples/ holds: a transformers update, conversations of an agent, a TRL run
	@$(BIN)/python examples/transformers_update.py
	@$(BIN)/python examples/agent_conversations.py
	@$(BIN)/python examples/trl_grpo.py

bench: $(INSTALLED) ## measure flexpg and its peers on a CPU, side by side, and write the tables; ARGS="update mask" for some
	@$(BIN)/python -m benchmarks $(ARGS)

bench-gpu: $(INSTALLED) ## the same on a CUDA GPU
	@$(BIN)/python -m benchmarks --device cuda $(ARGS)

gpu: $(INSTALLED) ## on a machine with CUDA GPUs: the tests that need one, the recipe on all of them, the benchmarks
	@$(BIN)/pytest -k cuda -rs
	@$(BIN)/tune run --nproc_per_node gpu recipes/grpo.py --config recipes/configs/tiny_lora_cpu.yaml \
		device=cuda dtype=bf16 output_dir=runs/gpu num_steps=10
	@$(MAKE) --no-print-directory bench-gpu

lint: $(INSTALLED) ## check style, formatting and types, and that no file holds a secret
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@git ls-files | xargs $(BIN)/detect-secrets-hook --no-verify --exclude-files '^examples/data/tau_bench_sample\.json$$'

clean: ## remove .venv, caches and build products; runs/ stays
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing flexpg and its tools into .venv (a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[recipes,report,trl,dev]'
	@touch $@

